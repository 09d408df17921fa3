//! A disk that does what disks do: it forgets what was not synced, fails at a chosen call, runs full, and lies after a
//! failed sync. A call can also be held back for as long as a test likes.
//!
//! Files live in memory, on two planes: what a process sees, and what would survive a power cut. `state.db` lies in a real
//! folder; of it the double keeps what SQLite has reported as synced.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::source::embedded::disk::{Access, Disk, DiskFile, RealDisk};

const BLOCK: usize = 512;

/// One file's bytes.
#[derive(Clone, Default)]
struct Bytes {
    live: Vec<u8>,
    durable: Vec<u8>,
    /// Blocks that were written and not synced.
    dirty: BTreeSet<usize>,
}

/// Which file a name stands for.
type Names = BTreeMap<PathBuf, u64>;

#[derive(Default)]
struct World {
    live: Names,
    durable: Names,
    files: BTreeMap<u64, Bytes>,
    next: u64,
    /// Calls that change something, so far.
    calls: u64,
    /// This call fails.
    fail_at: Option<u64>,
    failed: bool,
    /// With it everything after it fails too: the process is gone.
    crashes: bool,
    /// Of a write that fails so much is there.
    short: Short,
    /// Reads so far, and the one that fails.
    reads: u64,
    fail_read_at: Option<u64>,
    /// Every read is cut short, and every other one is interrupted first.
    choppy: bool,
    /// Bytes that files may still grow by.
    room: u64,
    locks: BTreeSet<PathBuf>,
    synced_state: Option<BTreeMap<String, Vec<u8>>>,
}

/// How much of a write has reached the file when it fails.
#[derive(Clone, Copy, Debug, Default)]
pub(super) enum Short {
    Nothing,
    #[default]
    Half,
    AllButOneByte,
    Everything,
}

/// A call that can be held back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Write,
    Sync,
}

/// Where calls wait that a test holds back.
#[derive(Default)]
struct Gate {
    /// This call on files with this ending, and how many wait.
    closed: Mutex<Option<(Call, &'static str, usize)>>,
    open: Condvar,
}

/// The disk; clones are the same one.
#[derive(Clone)]
pub(super) struct Double {
    root: PathBuf,
    world: Arc<Mutex<World>>,
    gate: Arc<Gate>,
}

struct File {
    double: Double,
    number: u64,
}

fn broken() -> io::Error {
    io::Error::other("the disk failed (by order of the test)")
}

impl World {
    /// Counts a changing call; true when it is the one to fail.
    fn fails(&mut self) -> bool {
        self.calls += 1;
        let fails = self.fail_at == Some(self.calls) || (self.crashes && self.failed);
        self.failed |= fails;
        fails
    }

    /// Counts a read; true when it is the one to fail.
    fn read_fails(&mut self) -> bool {
        self.reads += 1;
        let fails = self.fail_read_at == Some(self.reads) || (self.crashes && self.failed);
        self.failed |= fails;
        fails
    }
}

impl Double {
    pub(super) fn new(root: &Path) -> Self {
        let world = World { room: u64::MAX, ..World::default() };
        Self::of(root, world)
    }

    fn of(root: &Path, world: World) -> Self {
        Self { root: root.to_owned(), world: Arc::new(Mutex::new(world)), gate: Arc::default() }
    }

    /// Holds back every such call on a file whose name ends so, until [`Double::let_go`].
    pub(super) fn hold(&self, call: Call, ending: &'static str) {
        *self.gate.closed.lock() = Some((call, ending, 0));
    }

    /// Whether a call waits at the gate now.
    pub(super) fn holds_one(&self) -> bool {
        self.gate.closed.lock().is_some_and(|(.., waiting)| waiting > 0)
    }

    /// Lets go what is held back.
    pub(super) fn let_go(&self) {
        *self.gate.closed.lock() = None;
        self.gate.open.notify_all();
    }

    /// Waits while this call on this file is held back.
    fn pass(&self, call: Call, number: u64) {
        let mut closed = self.gate.closed.lock();
        let mut counted = false;
        while let Some((held, ending, waiting)) = closed.as_mut() {
            // Looked up each time: a file keeps its handle when it is given another name.
            let is_meant = |path: &Path| path.to_string_lossy().ends_with(*ending);
            if *held != call || !self.world.lock().live.iter().any(|(path, of)| *of == number && is_meant(path)) {
                return;
            }
            *waiting += usize::from(!std::mem::replace(&mut counted, true));
            self.gate.open.wait(&mut closed);
        }
    }

    /// The `n`-th changing call from now on fails.
    pub(super) fn fail_after(&self, n: u64) {
        let mut world = self.world.lock();
        world.fail_at = Some(world.calls + n);
        world.failed = false;
    }

    /// The `n`-th changing call from now on fails, and so does everything after it.
    pub(super) fn crash_after(&self, n: u64) {
        self.fail_after(n);
        self.world.lock().crashes = true;
    }

    /// Of a write that fails so much reaches the file.
    pub(super) fn set_short(&self, short: Short) {
        self.world.lock().short = short;
    }

    /// The `n`-th read from now on fails.
    pub(super) fn fail_read_after(&self, n: u64) {
        let mut world = self.world.lock();
        world.fail_read_at = Some(world.reads + n);
        world.failed = false;
    }

    /// From now on reads give a few bytes at a time, and are interrupted in between.
    pub(super) fn make_choppy(&self) {
        self.world.lock().choppy = true;
    }

    /// Whether the call that should fail has come.
    pub(super) fn has_failed(&self) -> bool {
        self.world.lock().failed
    }

    /// Files may grow by so many bytes more.
    pub(super) fn set_room(&self, bytes: u64) {
        self.world.lock().room = bytes;
    }

    fn name(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap_or(path).to_owned()
    }

    /// What is left when the power goes now. Of what was not synced each block and the names may have made it or not, as
    /// `seed` decides. `root` is an empty folder for the new world's `state.db`.
    pub(super) fn power_cut(&self, seed: u64, root: &Path) -> Self {
        let mut dice = fastrand::Rng::with_seed(seed);
        let world = self.world.lock();
        let names = if dice.bool() { &world.durable } else { &world.live };
        let mut left = World { room: u64::MAX, next: world.next, ..World::default() };
        for (path, number) in names {
            let Some(file) = world.files.get(number) else { continue };
            let mut bytes = if dice.bool() { file.durable.clone() } else { resized(&file.durable, file.live.len()) };
            for block in &file.dirty {
                let at = block * BLOCK;
                let end = (at + BLOCK).min(bytes.len()).min(file.live.len());
                if at < end && dice.bool() {
                    bytes[at..end].copy_from_slice(&file.live[at..end]);
                }
            }
            left.files.insert(*number, Bytes { live: bytes.clone(), durable: bytes, dirty: BTreeSet::new() });
            left.live.insert(path.clone(), *number);
        }
        left.durable = left.live.clone();
        for (name, bytes) in world.synced_state.iter().flatten() {
            std::fs::write(root.join(name), bytes).unwrap();
        }
        left.synced_state = world.synced_state.clone();
        Self::of(root, left)
    }

    /// A power cut that takes all that was not synced, and of `state.db` nothing: its pages had just been written back.
    pub(super) fn power_cut_after_state(&self, root: &Path) -> Self {
        let world = self.world.lock();
        self.left(&world.durable, &world, |file| &file.durable, root)
    }

    /// What the next process finds after a kill: everything that was written, synced or not.
    pub(super) fn kill(&self, root: &Path) -> Self {
        let world = self.world.lock();
        self.left(&world.live, &world, |file| &file.live, root)
    }

    fn left(&self, names: &Names, world: &World, bytes: impl Fn(&Bytes) -> &Vec<u8>, root: &Path) -> Self {
        let mut left = World { room: u64::MAX, next: world.next, ..World::default() };
        for (path, number) in names {
            let bytes = bytes(&world.files[number]).clone();
            left.files.insert(*number, Bytes { live: bytes.clone(), durable: bytes, dirty: BTreeSet::new() });
            left.live.insert(path.clone(), *number);
        }
        left.durable = left.live.clone();
        let state = state_files(&self.root.join("state.db"));
        for (name, bytes) in &state {
            std::fs::write(root.join(name), bytes).unwrap();
        }
        left.synced_state = Some(state);
        Self::of(root, left)
    }

    /// The same files once more over the same `state.db`, which neither of the two may then change.
    pub(super) fn again(&self) -> Self {
        let world = self.world.lock();
        let copy = World {
            live: world.live.clone(),
            durable: world.durable.clone(),
            files: world.files.clone(),
            next: world.next,
            room: u64::MAX,
            synced_state: world.synced_state.clone(),
            ..World::default()
        };
        Self::of(&self.root, copy)
    }

    /// Every file that is there, with its bytes, by its name in the folder.
    pub(super) fn contents(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let world = self.world.lock();
        world.live.iter().map(|(path, number)| (path.clone(), world.files[number].live.clone())).collect()
    }

    /// Changes a file's bytes behind everybody's back.
    pub(super) fn damage(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut world = self.world.lock();
        let number = world.live[path];
        let file = world.files.get_mut(&number).unwrap();
        change(&mut file.live);
        file.durable.clone_from(&file.live);
    }
}

/// SQLite's files are real.
fn is_state(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("state.db"))
}

/// The bytes of `state.db` as the process sees them.
fn state_files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut copy = BTreeMap::new();
    for suffix in ["", "-wal"] {
        let mut file = path.as_os_str().to_owned();
        file.push(suffix);
        if let Ok(bytes) = std::fs::read(&file) {
            copy.insert(format!("state.db{suffix}"), bytes);
        }
    }
    copy
}

fn resized(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len, 0);
    bytes
}

impl DiskFile for File {
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.double.pass(Call::Write, self.number);
        let mut world = self.double.world.lock();
        let fails = world.fails();
        let start = usize::try_from(offset).unwrap();
        let len = world.files[&self.number].live.len();
        let mut take = bytes.len();
        if fails {
            take = match world.short {
                Short::Nothing => 0,
                Short::Half => take / 2,
                Short::AllButOneByte => take.saturating_sub(1),
                Short::Everything => take,
            };
        }
        let growth = ((start + take).saturating_sub(len)) as u64;
        let full = growth > world.room;
        if full {
            take = take.saturating_sub(usize::try_from(growth - world.room).unwrap());
        }
        world.room -= growth.min(world.room);
        let file = world.files.get_mut(&self.number).unwrap();
        if file.live.len() < start + take {
            file.live.resize(start + take, 0);
        }
        file.live[start..start + take].copy_from_slice(&bytes[..take]);
        if take > 0 {
            file.dirty.extend(start / BLOCK..=(start + take - 1) / BLOCK);
        }
        drop(world);
        match (fails, full) {
            (true, _) => Err(broken()),
            (_, true) => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut world = self.double.world.lock();
        if world.read_fails() {
            return Err(broken());
        }
        if world.choppy && world.reads % 2 == 1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let most = if world.choppy { 1_001 } else { usize::MAX };
        let live = &world.files[&self.number].live;
        let start = usize::try_from(offset).unwrap().min(live.len());
        let end = (start + buffer.len().min(most)).min(live.len());
        buffer[..end - start].copy_from_slice(&live[start..end]);
        Ok(end - start)
    }

    fn sync(&self) -> io::Result<()> {
        self.double.pass(Call::Sync, self.number);
        let mut world = self.double.world.lock();
        let fails = world.fails();
        let file = world.files.get_mut(&self.number).unwrap();
        let dirty = std::mem::take(&mut file.dirty);
        if fails {
            // The pages are clean now and never reach the disk: the next sync will claim success.
            return Err(broken());
        }
        file.durable.resize(file.live.len(), 0);
        for block in dirty {
            let (start, end) = (block * BLOCK, ((block + 1) * BLOCK).min(file.live.len()));
            if start < end {
                file.durable[start..end].copy_from_slice(&file.live[start..end]);
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut world = self.double.world.lock();
        if world.fails() {
            return Err(broken());
        }
        let file = world.files.get_mut(&self.number).unwrap();
        file.live.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.double.world.lock().files[&self.number].live.len() as u64)
    }
}

impl Disk for Double {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn DiskFile>> {
        if is_state(path) {
            return RealDisk.open(path, access);
        }
        let name = self.name(path);
        let mut world = self.world.lock();
        let known = world.live.get(&name).copied();
        let number = match (known, access) {
            (Some(number), Access::Read | Access::Write) => number,
            (None, Access::Read | Access::Write) => return Err(io::ErrorKind::NotFound.into()),
            (_, Access::Create) => {
                if world.fails() {
                    return Err(broken());
                }
                let number = known.unwrap_or(world.next + 1);
                world.next = world.next.max(number);
                let file = world.files.entry(number).or_default();
                file.live.clear();
                world.live.insert(name, number);
                number
            }
        };
        Ok(Arc::new(File { double: self.clone(), number }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if is_state(from) {
            return RealDisk.rename(from, to);
        }
        let (from, to) = (self.name(from), self.name(to));
        let mut world = self.world.lock();
        if world.fails() {
            return Err(broken());
        }
        let number = world.live.remove(&from).ok_or(io::ErrorKind::NotFound)?;
        world.live.insert(to, number);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if is_state(path) {
            return RealDisk.remove(path);
        }
        let name = self.name(path);
        let mut world = self.world.lock();
        if world.fails() {
            return Err(broken());
        }
        let number = world.live.remove(&name).ok_or(io::ErrorKind::NotFound)?;
        let len = world.files[&number].live.len() as u64;
        world.room = world.room.saturating_add(len);
        Ok(())
    }

    fn remove_folder(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn make_folder(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        let folder = self.name(path);
        let mut world = self.world.lock();
        if world.fails() {
            return Err(broken());
        }
        let inside = |path: &PathBuf| path.parent() == Some(&folder);
        world.durable.retain(|path, _| !inside(path));
        let now: Vec<_> = world.live.iter().filter(|(path, _)| inside(path)).map(|(p, n)| (p.clone(), *n)).collect();
        world.durable.extend(now);
        Ok(())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let folder = self.name(path);
        let world = self.world.lock();
        let mut names: BTreeSet<String> = BTreeSet::new();
        for path in world.live.keys() {
            if let Some(first) = path.strip_prefix(&folder).ok().and_then(|rest| rest.components().next()) {
                names.insert(first.as_os_str().to_string_lossy().into_owned());
            }
        }
        Ok(names.into_iter().collect())
    }

    fn lock(&self, path: &Path, _note: &str) -> io::Result<Option<Box<dyn Any + Send + Sync>>> {
        let name = self.name(path);
        if !self.world.lock().locks.insert(name.clone()) {
            return Ok(None);
        }
        Ok(Some(Box::new(Lock(self.clone(), name))))
    }

    fn database_synced(&self, path: &Path) {
        self.world.lock().synced_state = Some(state_files(path));
    }
}

struct Lock(Double, PathBuf);

impl Drop for Lock {
    fn drop(&mut self) {
        self.0.world.lock().locks.remove(&self.1);
    }
}
