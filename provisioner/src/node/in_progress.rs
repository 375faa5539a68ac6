//! What is being done right now, so that no volume is worked on twice at once
//! and no volume group by more than one task.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lvm::names::VgName;
use tokio::sync::{OwnedMutexGuard, watch};

/// The operations of this node service that are under way.
#[derive(Debug)]
pub struct InProgress {
    volumes: Mutex<HashSet<String>>,
    queues: Mutex<HashMap<VgName, Arc<tokio::sync::Mutex<()>>>>,
    /// How many volumes are worked on, for those who wait for a quiet moment.
    count: watch::Sender<usize>,
}

/// One operation on one volume; it ends when this is dropped.
#[derive(Debug)]
pub struct Operation {
    all: Arc<InProgress>,
    volume: String,
}

/// Another operation on the same volume is under way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("another operation on volume {volume} is under way; call again when it has ended")]
pub struct Busy {
    /// The volume.
    pub volume: String,
}

impl Default for InProgress {
    fn default() -> Self {
        Self { volumes: Mutex::default(), queues: Mutex::default(), count: watch::Sender::new(0) }
    }
}

impl InProgress {
    /// Begins an operation on a volume.
    ///
    /// Keep what it returns in the thread that does the work: the call that
    /// asked for it may be cancelled long before that ends.
    ///
    /// # Errors
    /// When one is under way already.
    pub fn begin(self: &Arc<Self>, volume: &str) -> Result<Operation, Busy> {
        let mut volumes = lock(&self.volumes);
        if !volumes.insert(volume.to_owned()) {
            return Err(Busy { volume: volume.to_owned() });
        }
        self.count.send_replace(volumes.len());
        Ok(Operation { all: Arc::clone(self), volume: volume.to_owned() })
    }

    /// Waits for this process's turn at a volume group, first come first
    /// served. Waiting for the lock between processes takes a thread: among
    /// ourselves there is no need for one.
    pub async fn turn(&self, vg: &VgName) -> OwnedMutexGuard<()> {
        let queue = Arc::clone(lock(&self.queues).entry(vg.clone()).or_default());
        queue.lock_owned().await
    }

    /// How many operations are under way.
    pub fn count(&self) -> watch::Receiver<usize> {
        self.count.subscribe()
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut volumes = lock(&self.all.volumes);
        volumes.remove(&self.volume);
        self.all.count.send_replace(volumes.len());
    }
}

/// A panic elsewhere leaves a set of names as good as it was.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_operation_on_a_volume_is_refused_until_the_first_ends() {
        let all = Arc::new(InProgress::default());
        let first = all.begin("vg0/a").unwrap();
        assert_eq!(all.begin("vg0/a").unwrap_err().volume, "vg0/a");
        let other = all.begin("vg0/b").unwrap();
        assert_eq!(*all.count().borrow(), 2);
        drop(first);
        let again = all.begin("vg0/a").unwrap();
        drop((other, again));
        assert_eq!(*all.count().borrow(), 0);
    }

    #[test]
    fn operation_ends_when_its_thread_panics() {
        let all = Arc::new(InProgress::default());
        let operation = all.begin("vg0/a").unwrap();
        std::thread::spawn(move || {
            let _operation = operation;
            panic!("on purpose");
        })
        .join()
        .unwrap_err();
        all.begin("vg0/a").unwrap();
    }

    #[tokio::test]
    async fn turns_come_in_order_and_per_group() {
        let all = Arc::new(InProgress::default());
        let (a, b) = (VgName::parse("a").unwrap(), VgName::parse("b").unwrap());
        let turn = all.turn(&a).await;
        let _other = all.turn(&b).await;
        let waiting = tokio::spawn({
            let (all, a) = (Arc::clone(&all), a.clone());
            async move { all.turn(&a).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(turn);
        waiting.await.unwrap();
    }
}
