//! Looks at objects that something has happened to, each by itself: many at
//! once, but none twice at the same time.
//!
//! Only references wait here. An object is taken out of what the watch has
//! brought when its turn comes.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, Stream, StreamExt};
use kube::runtime::controller;
use kube::runtime::reflector::ObjectRef;
use kube::runtime::scheduler::{ScheduleRequest, scheduler};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::objects::{Kept, Objects};

/// What follows when an object has been looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action {
    again: Option<Duration>,
}

impl Action {
    /// It is looked at again after this time, or when it changes.
    pub const fn requeue(after: Duration) -> Self {
        Self { again: Some(after) }
    }

    /// It is looked at again when it changes.
    pub const fn await_change() -> Self {
        Self { again: None }
    }
}

impl From<Action> for controller::Action {
    fn from(action: Action) -> Self {
        action.again.map_or_else(Self::await_change, Self::requeue)
    }
}

/// Has `work` look at what `triggers` names, as soon as all objects are known;
/// until `triggers` ends.
pub async fn run<K, W, F>(objects: &Objects<K>, triggers: impl Stream<Item = ObjectRef<K>>, work: W)
where
    K: Kept,
    W: Fn(Arc<K>) -> F,
    F: Future<Output = Action>,
{
    let (later, requests) = mpsc::unbounded_channel();
    // It cannot fail: the other end is here.
    let ask = |message, run_at| drop(later.send(ScheduleRequest { message, run_at }));
    let mut queue = pin!(scheduler(UnboundedReceiverStream::new(requests)));
    let mut triggers = pin!(triggers);
    let mut ready = pin!(objects.wait_until_ready());
    let mut is_ready = false;
    let mut running = FuturesUnordered::new();
    let mut busy: HashSet<ObjectRef<K>> = HashSet::new();
    loop {
        tokio::select! {
            object = triggers.next() => match object {
                Some(object) => ask(object, Instant::now()),
                None => return,
            },
            () = &mut ready, if !is_ready => is_ready = true,
            Some((object, action)) = running.next() => {
                busy.remove(&object);
                let Action { again } = action;
                if let Some(after) = again {
                    ask(object, Instant::now() + after);
                }
            }
            Some(reference) = next_but(queue.as_mut(), &busy), if is_ready => {
                // Gone meanwhile, perhaps.
                if let Some(object) = objects.get(&reference) {
                    busy.insert(reference.clone());
                    let done = work(object);
                    running.push(async move { (reference, done.await) });
                }
            }
        }
    }
}

type Queue<'a, K, R> = std::pin::Pin<&'a mut kube::runtime::scheduler::Scheduler<ObjectRef<K>, R>>;

/// The next that is due, and not busy.
async fn next_but<K, R>(queue: Queue<'_, K, R>, busy: &HashSet<ObjectRef<K>>) -> Option<ObjectRef<K>>
where
    K: Kept,
    R: Stream<Item = ScheduleRequest<ObjectRef<K>>>,
{
    queue.hold_unless(|object| !busy.contains(object)).next().await
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use k8s_openapi::api::core::v1::PersistentVolume;
    use kube::ResourceExt;
    use kube::runtime::watcher::Event;
    use tokio::sync::Semaphore;

    use super::*;

    fn named(name: &str) -> PersistentVolume {
        PersistentVolume {
            metadata: kube::api::ObjectMeta { name: Some(name.into()), ..Default::default() },
            ..Default::default()
        }
    }

    #[derive(Default)]
    struct Log(Mutex<Vec<String>>);

    impl Log {
        fn note(&self, what: impl Into<String>) {
            self.0.lock().unwrap().push(what.into());
        }

        fn taken(&self) -> Vec<String> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn none_twice_at_the_same_time_and_what_comes_meanwhile_is_not_lost() {
        let objects = Objects::default();
        for name in ["a", "b"] {
            objects.take(Event::Apply(named(name)));
        }
        objects.take(Event::InitDone);
        let (log, go) = (Log::default(), Semaphore::new(0));
        let (trigger, triggers) = mpsc::unbounded_channel();
        let running = run(&objects, UnboundedReceiverStream::new(triggers), async |volume: Arc<PersistentVolume>| {
            log.note(format!("{} begins", volume.name_any()));
            go.acquire().await.unwrap().forget();
            log.note(format!("{} ends", volume.name_any()));
            Action::await_change()
        });
        let told = async {
            let pause = async || tokio::time::sleep(Duration::from_secs(1)).await;
            for name in ["a", "a", "gone"] {
                trigger.send(ObjectRef::new(name)).unwrap();
            }
            pause().await;
            assert_eq!(log.taken(), ["a begins"]);
            for name in ["a", "a", "b"] {
                trigger.send(ObjectRef::new(name)).unwrap();
            }
            pause().await;
            assert_eq!(log.taken(), ["b begins"]);
            go.add_permits(8);
            pause().await;
            let mut seen = log.taken();
            seen.sort();
            assert_eq!(seen, ["a begins", "a ends", "a ends", "b ends"]);
            drop(trigger);
        };
        futures::future::join(running, told).await;
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_looked_at_before_all_is_known_and_then_as_often_as_is_asked() {
        let objects = Objects::default();
        objects.take(Event::Init);
        objects.take(Event::InitApply(named("a")));
        let begun = Instant::now();
        let log = Log::default();
        let (trigger, triggers) = mpsc::unbounded_channel();
        let running = run(&objects, UnboundedReceiverStream::new(triggers), async |_: Arc<PersistentVolume>| {
            log.note(begun.elapsed().as_secs().to_string());
            Action::requeue(Duration::from_secs(10))
        });
        let told = async {
            trigger.send(ObjectRef::new("a")).unwrap();
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert!(log.taken().is_empty());
            objects.take(Event::InitDone);
            tokio::time::sleep(Duration::from_secs(21)).await;
            assert_eq!(log.taken(), ["5", "15", "25"]);
            // Sooner, by a trigger, from which the next counts.
            trigger.send(ObjectRef::new("a")).unwrap();
            tokio::time::sleep(Duration::from_secs(14)).await;
            assert_eq!(log.taken(), ["26", "36"]);
            drop(trigger);
        };
        futures::future::join(running, told).await;
    }
}
