//! Overwrites volumes, one at a time, while calls come and go, and empties the
//! trash when its time has come. New volumes go first, and the trash gives way
//! to whoever else uses the disk: half of the time it does nothing.
//!
//! A call that needs a volume zeroed waits for a while, and is told how far it
//! has come if that was not enough; the work goes on, and the same call again
//! finds it. What is to be done is on the disk, as a tag of the volume; what is
//! here is only who is at it.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lvm::Lvm;
use lvm::clock::now;
use lvm::names::{LvName, VgName};
use lvm::report::LogicalVolume;
use lvm::size::human;
use lvm::trash::Emptied;
use lvm::wipe::Wiped;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::capacity::Capacity;
use super::served::Served;

/// What is done with a volume before anybody is given it.
pub const ZEROED: &str = "overwritten with zeros";
/// The same, of one that is to be a copy of another.
pub const COPIED: &str = "filled with what it is made from";

/// How long a call waits for a volume to be overwritten. The controller gives
/// it a minute.
const PATIENCE: Duration = Duration::from_secs(20);

/// Until one that could not be removed from the trash is tried again.
const AGAIN: Duration = Duration::from_secs(60);
/// Of the pauses between pieces of what is in the trash.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A logical volume.
type Key = (VgName, LvName);

/// Why a volume is not overwritten yet.
#[derive(Debug, thiserror::Error)]
pub enum NotFinished {
    /// It takes its time.
    #[error(
        "{vg}/{lv} is {doing} before anybody is given it: {} of {} done; call again",
        human(*.done), human(*.total)
    )]
    UnderWay {
        /// The group.
        vg: VgName,
        /// The volume.
        lv: LvName,
        /// What is being done.
        doing: &'static str,
        /// Bytes that it is done with.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// It has failed.
    #[error("{0}")]
    Failed(String),
}

/// How far one has come.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    leave_off: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Key>,
    running: Option<(Key, Arc<Progress>)>,
    failed: HashMap<Key, String>,
    /// What is in the trash, as the last report has it.
    trash: Vec<LogicalVolume>,
    /// It may have changed since.
    stale: bool,
    /// To be removed before its time, and since when it has been in the trash.
    forced: HashSet<(Key, Option<i64>)>,
    /// Not to be tried before.
    not_before: HashMap<Key, Instant>,
}

/// What is to be done next.
enum Next {
    New(Key, Arc<Progress>),
    Look,
    Empty(Box<LogicalVolume>, Arc<Progress>),
    Wait(Option<Duration>),
}

/// What metrics say of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Bytes that the volume that is being overwritten still has to go.
    pub left: u64,
    /// Bytes overwritten or discarded since the node service started.
    pub wiped: u64,
}

#[derive(Debug)]
struct Shared {
    lvm: Arc<Lvm>,
    served: Served,
    capacity: Capacity,
    state: Mutex<State>,
    stopping: AtomicBool,
    wiped: AtomicU64,
    /// Something has been asked for, or has ended.
    changed: watch::Sender<()>,
}

/// The worker, as those see it that ask it for something. Clones share it.
#[derive(Debug, Clone)]
pub struct Wiper {
    shared: Arc<Shared>,
}

impl Wiper {
    /// Of this node; [`Wiper::run`] does the work.
    pub fn new(lvm: Arc<Lvm>, served: Served, capacity: Capacity) -> Self {
        let changed = watch::Sender::new(());
        let (state, stopping, wiped) = Default::default();
        Self { shared: Arc::new(Shared { lvm, served, capacity, state, stopping, wiped, changed }) }
    }

    /// By what LVM says at the start: whether there is anything in the trash.
    pub fn begin(&self, volumes: &[LogicalVolume]) {
        if volumes.iter().any(|volume| volume.marks.trashed.is_some()) {
            self.trash_changed();
        }
    }

    /// Something has gone to the trash, or come from there.
    pub fn trash_changed(&self) {
        self.state().stale = true;
        self.shared.changed.send_replace(());
    }

    /// A volume in the trash is to be removed now, provided that it has been
    /// there since `since`. Whether it is there.
    pub fn empty_now(&self, vg: &VgName, lv: &LvName, since: i64) -> bool {
        let mut state = self.state();
        let is_it = |one: &LogicalVolume| one.vg == *vg && one.name == *lv && one.marks.trashed == Some(since);
        if !state.trash.iter().any(is_it) {
            return false;
        }
        let key = (vg.clone(), lv.clone());
        state.not_before.remove(&key);
        state.forced.insert((key, Some(since)));
        drop(state);
        self.shared.changed.send_replace(());
        true
    }

    /// How far the wipe of a volume has come. None: nobody is at it.
    pub fn progress(&self, vg: &str, lv: &str) -> Option<u64> {
        let state = self.state();
        let ((group, name), progress) = state.running.as_ref()?;
        (group.as_str() == vg && name.as_str() == lv).then(|| progress.done.load(Ordering::Relaxed))
    }

    /// For metrics.
    pub fn figures(&self) -> Figures {
        let running = self.state().running.as_ref().map(|(_, progress)| Arc::clone(progress));
        let left = running.map_or(0, |progress| {
            progress.total.load(Ordering::Relaxed).saturating_sub(progress.done.load(Ordering::Relaxed))
        });
        Figures { left, wiped: self.shared.wiped.load(Ordering::Relaxed) }
    }

    /// What is in the trash: number and bytes of each group.
    pub fn trash(&self) -> BTreeMap<VgName, (u64, u64)> {
        let mut sums = BTreeMap::new();
        for volume in &self.state().trash {
            let (count, bytes): &mut (u64, u64) = sums.entry(volume.vg.clone()).or_default();
            *count += 1;
            *bytes = bytes.saturating_add(volume.size);
        }
        sums
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a volume overwritten, or filled, that bears the mark for it, and waits
    /// a while.
    ///
    /// # Errors
    /// When it is not done yet, or has failed.
    pub async fn finished(&self, vg: &VgName, lv: &LvName, doing: &'static str) -> Result<(), NotFinished> {
        let key = (vg.clone(), lv.clone());
        let mut changed = self.shared.changed.subscribe();
        {
            let mut state = self.state();
            state.failed.remove(&key);
            let known = state.waiting.contains(&key) || state.running.as_ref().is_some_and(|(at, _)| *at == key);
            if !known {
                state.waiting.push_back(key.clone());
            }
        }
        self.shared.changed.send_replace(());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (mut done, mut total) = (0, 0);
            {
                let mut state = self.state();
                match &state.running {
                    Some((at, progress)) if *at == key => {
                        done = progress.done.load(Ordering::Relaxed);
                        total = progress.total.load(Ordering::Relaxed);
                    }
                    _ if state.waiting.contains(&key) => {}
                    _ => return state.failed.remove(&key).map_or(Ok(()), |why| Err(NotFinished::Failed(why))),
                }
            }
            let stopping = self.shared.stopping.load(Ordering::Relaxed);
            if stopping || timeout_at(deadline, changed.changed()).await.is_err() {
                return Err(NotFinished::UnderWay { vg: key.0, lv: key.1, doing, done, total });
            }
        }
    }

    /// Has nobody overwrite this volume any more, as before it is removed.
    pub async fn leave_off(&self, vg: &VgName, lv: &LvName) {
        let mut changed = self.shared.changed.subscribe();
        loop {
            {
                let mut state = self.state();
                state.waiting.retain(|(group, name)| group != vg || name != lv);
                match &state.running {
                    Some(((group, name), progress)) if group == vg && name == lv => {
                        progress.leave_off.store(true, Ordering::Relaxed);
                    }
                    _ => return,
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    /// Ends [`Wiper::run`] after the piece that is being written.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.changed.send_replace(());
    }

    /// Works until it is stopped.
    pub async fn run(self) {
        let mut changed = self.shared.changed.subscribe();
        loop {
            if self.shared.stopping.load(Ordering::Relaxed) {
                return;
            }
            match self.next() {
                Next::Wait(time) => {
                    let changed = changed.changed();
                    match time {
                        Some(time) => drop(tokio::time::timeout(time, changed).await),
                        None => drop(changed.await),
                    }
                }
                Next::Look => self.look().await,
                Next::New(key, progress) => {
                    let (wiper, at) = (self.clone(), key.clone());
                    let zeroed = tokio::task::spawn_blocking(move || wiper.zero(&at, &progress)).await;
                    let mut state = self.state();
                    state.running = None;
                    if let Err(why) = zeroed.map_err(|error| error.to_string()).and_then(|zeroed| zeroed) {
                        state.failed.insert(key, why);
                    }
                    drop(state);
                    self.shared.changed.send_replace(());
                }
                Next::Empty(volume, progress) => {
                    let key = (volume.vg.clone(), volume.name.clone());
                    let wiper = self.clone();
                    let emptied = tokio::task::spawn_blocking(move || wiper.empty(&volume, &progress)).await;
                    let mut state = self.state();
                    state.running = None;
                    state.stale = true;
                    if !emptied.unwrap_or(false) {
                        state.not_before.insert(key, Instant::now() + AGAIN);
                    }
                    drop(state);
                    self.shared.changed.send_replace(());
                }
            }
        }
    }

    fn next(&self) -> Next {
        let mut state = self.state();
        let progress = Arc::new(Progress::default());
        if let Some(key) = state.waiting.pop_front() {
            state.running = Some((key.clone(), Arc::clone(&progress)));
            return Next::New(key, progress);
        }
        if state.stale {
            return Next::Look;
        }
        let now = now();
        let mut wait = None;
        let mut due = None;
        for volume in &state.trash {
            let key = (volume.vg.clone(), volume.name.clone());
            let forced = state.forced.contains(&(key.clone(), volume.marks.trashed));
            // What has begun is not left lying.
            let time = volume.marks.trashed_until().filter(|_| !forced && !volume.marks.wiping).unwrap_or(0);
            let held_off = state.not_before.get(&key).map(|until| until.saturating_duration_since(Instant::now()));
            let left = Duration::from_secs(u64::try_from(time.saturating_sub(now)).unwrap_or(0));
            let left = left.max(held_off.unwrap_or_default());
            if left.is_zero() {
                due = due.or_else(|| Some(volume.clone()));
            } else {
                wait = Some(wait.map_or(left, |least: Duration| least.min(left)));
            }
        }
        match due {
            Some(volume) => {
                state.running = Some(((volume.vg.clone(), volume.name.clone()), Arc::clone(&progress)));
                Next::Empty(Box::new(volume), progress)
            }
            // A clock may be set.
            None => Next::Wait(wait.map(|time| time.min(Duration::from_secs(3600)))),
        }
    }

    /// Looks up what is in the trash.
    async fn look(&self) {
        self.state().stale = false;
        let (lvm, served) = (Arc::clone(&self.shared.lvm), self.shared.served.clone());
        let looked = tokio::task::spawn_blocking(move || lvm.trash(|vg| served.includes(vg))).await;
        match looked.map_err(|error| error.to_string()).and_then(|looked| looked.map_err(|e| crate::with_causes(&e))) {
            Ok(trash) => {
                {
                    let mut state = self.state();
                    let known: HashSet<Key> = trash.iter().map(|one| (one.vg.clone(), one.name.clone())).collect();
                    state.forced.retain(|(key, _)| known.contains(key));
                    state.not_before.retain(|key, _| known.contains(key));
                    state.trash = trash;
                }
                let sums = self.trash().into_iter().map(|(vg, (_, bytes))| (vg, bytes)).collect();
                self.shared.capacity.set_trash(sums);
            }
            Err(error) => {
                warn!(error, "cannot look into the trash; trying again");
                tokio::time::sleep(Duration::from_secs(5)).await;
                self.state().stale = true;
            }
        }
    }

    /// Whether there is nothing to wait for before the next attempt.
    fn empty(&self, volume: &LogicalVolume, progress: &Progress) -> bool {
        let name = format!("{}/{}", volume.vg, volume.name);
        let policy = volume.marks.intent.delete;
        info!(volume = name, policy = %policy, bytes = volume.size, "removing from the trash");
        let begun = std::time::Instant::now();
        let mut last = (begun, 0);
        let mut go_on = |done: u64, total: u64| {
            if done > last.1 && done < total {
                std::thread::sleep(last.0.elapsed().min(LONGEST_PAUSE));
            }
            self.note(progress, done, total);
            if total > 0 && done / (total / 4).max(1) > last.1 / (total / 4).max(1) {
                info!(volume = name, done, total, "wiping what was in the trash");
            }
            last = (std::time::Instant::now(), done);
            let urgent = !self.state().waiting.is_empty();
            !urgent && !progress.leave_off.load(Ordering::Relaxed) && !self.shared.stopping.load(Ordering::Relaxed)
        };
        let emptied = self.shared.lvm.empty(volume, &mut go_on);
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        match emptied {
            Ok(Emptied::Removed) => info!(volume = name, policy = %policy, ms, "removed from the trash"),
            Ok(Emptied::RemovedUndiscarded) => {
                warn!(
                    volume = name,
                    ms, "removed from the trash; the disk takes no discards, so its bytes were left as they are"
                );
            }
            Ok(Emptied::Partly) => info!(volume = name, ms, "left off; it goes on later"),
            Ok(Emptied::Absent) => {}
            Err(error) => {
                let error = crate::with_causes(&error);
                warn!(volume = name, error, "cannot remove from the trash");
                return false;
            }
        }
        true
    }

    fn note(&self, progress: &Progress, done: u64, total: u64) {
        let before = progress.done.swap(done, Ordering::Relaxed);
        // What an earlier run has done comes with the first call.
        if progress.total.swap(total, Ordering::Relaxed) != 0 {
            self.shared.wiped.fetch_add(done.saturating_sub(before), Ordering::Relaxed);
        }
    }

    fn zero(&self, (vg, lv): &Key, progress: &Progress) -> Result<(), String> {
        let begun = std::time::Instant::now();
        let mut go_on = |done, total| {
            self.note(progress, done, total);
            !progress.leave_off.load(Ordering::Relaxed) && !self.shared.stopping.load(Ordering::Relaxed)
        };
        let zeroed = self.shared.lvm.finish_new(vg, lv, &mut go_on);
        let bytes = progress.done.load(Ordering::Relaxed);
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        match zeroed {
            Ok(Wiped::Whole) => {
                info!(volume = format!("{vg}/{lv}"), bytes, ms, "a new volume is ready to be given out");
                Ok(())
            }
            Ok(Wiped::Partly | Wiped::Unable) => {
                Err(format!("making {vg}/{lv} ready was left off at {}", human(bytes)))
            }
            Err(error) => {
                let error = crate::with_causes(&error);
                warn!(volume = format!("{vg}/{lv}"), bytes, error, "cannot make a new volume ready");
                Err(error)
            }
        }
    }
}
