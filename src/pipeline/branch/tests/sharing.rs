//! Branches at one position run the stages that they have in common once between them, and nobody can tell by what arrives.

use std::sync::atomic::Ordering;

use super::*;

/// A namespace of two regions.
struct Regions {
    log: Arc<Memory>,
    revisions: Arc<Revisions>,
    plan: Arc<Plan>,
    clock: Clock,
    shared: Arc<Shared>,
    running: Vec<(Arc<Target>, BranchHandle)>,
    _ticker: tokio_util::task::AbortOnDropHandle<()>,
}

impl Regions {
    /// With this script for both, and so many records in the log; no branch runs yet.
    async fn new(script: &str, records: u64) -> Self {
        let (clock, ticker) = ticking();
        let log = Memory::new(1, clock.clone());
        let revisions = Arc::new(Revisions::new(Arc::clone(&log) as Arc<dyn Log>));
        let plan = Arc::new(plan_of(script, &clock));
        let epoch = log.put_epoch(plan.files.clone()).await.unwrap();
        revisions.publish(epoch.number, Arc::clone(&plan));
        for branch in &plan.branches {
            drop(log.open_branch(&branch.name, Start::Earliest).await.unwrap());
        }
        log.admit((0..records).map(|number| numbered(number, None)).collect()).await.unwrap();
        Self { log, revisions, plan, clock, shared: Arc::default(), running: Vec::new(), _ticker: ticker }
    }

    /// Starts the branch of a region.
    fn start(&mut self, number: usize) {
        let target = Target::new();
        let handle = start_branch(&self.log, &self.revisions, &target, &self.clock, &self.plan, number, &self.shared);
        self.running.push((target, handle));
    }

    /// Waits until the branches that run have ended everything.
    async fn drained(&self) {
        let end = Instant::now() + Duration::from_secs(3_600);
        while self.running.iter().any(|(_, handle)| self.log.lag(&handle.name()).records > 0) {
            assert!(Instant::now() < end, "they never end everything");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// What the branches that were started have delivered, each sorted.
    fn delivered(&self) -> Vec<Vec<u64>> {
        self.running.iter().map(|(target, _)| target.taken_sorted()).collect()
    }

    /// Events that the stages of the plan were run on.
    fn runs(&self) -> u64 {
        self.plan.transform.runs.load(Ordering::Relaxed)
    }
}

fn plan_of(script: &str, clock: &Clock) -> Plan {
    plan(
        &format!("replicate: {{ regions: {{ one: {{}}, two: {{}} }} }}\ntransform: [{{ inline: '{script}' }}]\n"),
        clock,
    )
}

#[tokio::test(start_paused = true)]
async fn branches_that_are_together_run_a_script_once_for_each_record() {
    let mut regions = Regions::new("payload.n = payload.n * 3 + 1;", 1_000).await;
    regions.start(0);
    regions.start(1);
    regions.drained().await;
    let expected: Vec<u64> = (0..1_000).map(|number| number * 3 + 1).collect();
    assert_eq!(regions.delivered(), [expected.clone(), expected]);
    // When both meet the last one of a read at once, both run it: two reads each.
    let runs = regions.runs();
    assert!((1_000..=1_004).contains(&runs), "{runs} runs");
}

#[tokio::test(start_paused = true)]
async fn a_branch_that_is_far_behind_runs_its_own_and_delivers_the_same() {
    let mut regions = Regions::new("payload.n = payload.n * 3 + 1;", 5_000).await;
    regions.start(0);
    regions.drained().await;
    assert_eq!(regions.runs(), 5_000);
    regions.start(1);
    regions.drained().await;
    let delivered = regions.delivered();
    assert_eq!(delivered[0].len(), 5_000);
    assert_eq!(delivered[0], delivered[1]);
    // Only the newest are kept, within their bound.
    assert!(regions.runs() > 8_000, "{} runs: something keeps too much", regions.runs());
}

#[tokio::test(start_paused = true)]
async fn an_edited_script_never_gets_what_the_old_one_made() {
    let mut regions = Regions::new("payload.n += 1000;", 100).await;
    regions.start(0);
    regions.drained().await;
    regions.plan = Arc::new(plan_of("payload.n += 2000;", &regions.clock));
    let epoch = regions.log.epochs().last().unwrap().number;
    regions.revisions.publish(epoch, Arc::clone(&regions.plan));
    regions.start(1);
    regions.drained().await;
    let after = |added: u64| (0..100).map(|number| number + added).collect::<Vec<_>>();
    assert_eq!(regions.delivered(), [after(1_000), after(2_000)]);
}

#[tokio::test(start_paused = true)]
async fn an_error_and_a_drop_are_shared_as_well() {
    let script = "if payload.n == 7 { fail(\"no seven\"); } if payload.n == 8 { drop(); }";
    let mut regions = Regions::new(script, 20).await;
    regions.start(0);
    regions.start(1);
    regions.drained().await;
    let expected: Vec<u64> = (0..20).filter(|number| !(7..=8).contains(number)).collect();
    assert_eq!(regions.delivered(), [expected.clone(), expected]);
    let dead = regions.log.dead_letters(DeadQuery { limit: 100, ..DeadQuery::default() }).await.unwrap().rows;
    assert_eq!(dead.iter().map(|letter| number(&letter.record)).collect::<Vec<_>>(), [7, 7], "one for each branch");
}
