//! `GET /metrics`, in the text form of Prometheus. Labels come from files only, never from records.

use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;
use prometheus::core::Collector;
use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{
    Encoder as _, GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::{Answer, ConfigState, Instance, View};
use crate::ingest::reply::{self, Problem};
use crate::pipeline::branch::BranchCounters;
use crate::telemetry::{Durations, DurationsSeen};

const BRANCH: [&str; 2] = ["ns", "branch"];

/// All that is shown; made anew for each scrape, so that what is gone is gone here too.
struct Page {
    registry: Registry,
}

impl Page {
    fn add<C: Collector + Clone + 'static>(&self, collector: &C) -> Result<(), prometheus::Error> {
        self.registry.register(Box::new(collector.clone()))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, prometheus::Error> {
        let gauges = IntGaugeVec::new(Opts::new(name, help), labels)?;
        self.add(&gauges)?;
        Ok(gauges)
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
        let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
        self.add(&counters)?;
        Ok(counters)
    }
}

/// Shows everything that is counted
#[utoipa::path(get, path = "/metrics", tag = "health",
    responses((status = 200, description = "The text form of Prometheus", body = String, content_type = "text/plain")))]
pub(super) fn answer(instance: &dyn Instance) -> Answer {
    let text = render(instance);
    let text = text.map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", error.to_string()))?;
    Ok(reply::bytes(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text))
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn render(instance: &dyn Instance) -> Result<Vec<u8>, prometheus::Error> {
    let page = Page { registry: Registry::new() };
    let ready = IntGauge::new("walflow_ready", "1 while writes are taken")?;
    ready.set(i64::from(instance.readiness().ready));
    page.add(&ready)?;
    let held = IntGauge::new("walflow_ingest_in_flight_bytes", "Bytes of writes that are not durable yet")?;
    held.set(whole(instance.bytes_in_flight()));
    page.add(&held)?;
    let build = page.gauges("walflow_build_info", "The version that runs", &["version"])?;
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
    let configured = IntGauge::new("walflow_config_applied_timestamp_seconds", "When the files were last read")?;
    configured.set(instance.configured_at().as_millis() / 1_000);
    page.add(&configured)?;
    journal(&page, instance)?;
    let views = instance.views();
    namespaces(&page, instance, &views)?;
    lags(&page, instance, &views)?;
    counts(&page, &views)?;
    let mut families = page.registry.gather();
    families.extend(prometheus::gather());
    families.extend(durations(instance, &views));
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(text)
}

fn journal(page: &Page, instance: &dyn Instance) -> Result<(), prometheus::Error> {
    let counters = instance.log_counters();
    for (name, help, counter) in [
        ("walflow_journal_groups_total", "Groups of changes that became durable", &counters.groups),
        ("walflow_journal_frames_total", "Changes that became durable", &counters.frames),
        ("walflow_journal_bytes_total", "Their bytes", &counters.bytes),
    ] {
        let shown = IntCounter::new(name, help)?;
        shown.inc_by(counter.load(Ordering::Relaxed));
        page.add(&shown)?;
    }
    Ok(())
}

/// The histograms; they are counted where the work is done, and only written down here.
fn durations(instance: &dyn Instance, views: &[View]) -> Vec<MetricFamily> {
    let counters = instance.log_counters();
    let mut attempts = Vec::new();
    for view in views {
        for (branch, handle) in &view.branches {
            let labels = vec![label("branch", branch.as_str()), label("ns", view.namespace.as_str())];
            attempts.push(histogram(labels, &handle.board().counters.attempts.seen()));
        }
    }
    let one = |durations: &Durations| vec![histogram(Vec::new(), &durations.seen())];
    let all = [
        ("walflow_attempt_duration_seconds", "How long attempts at a target took", attempts),
        ("walflow_journal_sync_duration_seconds", "How long syncs of the journal took", one(&counters.syncs)),
        ("walflow_release_lateness_seconds", "How late parked records were released", one(&counters.lateness)),
    ];
    let family = |(name, help, metrics): (&str, &str, Vec<Metric>)| {
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(MetricType::HISTOGRAM);
        family.set_metric(metrics);
        family
    };
    all.into_iter().filter(|(.., metrics)| !metrics.is_empty()).map(family).collect()
}

fn label(name: &str, value: &str) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.to_owned());
    pair
}

fn histogram(labels: Vec<LabelPair>, seen: &DurationsSeen) -> Metric {
    let bucket = |(bound, count): &(f64, u64)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(*count);
        bucket
    };
    let mut histogram = Histogram::default();
    histogram.set_bucket(seen.at_most.iter().map(bucket).collect());
    histogram.set_sample_count(seen.count);
    histogram.set_sample_sum(seen.sum);
    let mut metric = Metric::from_label(labels);
    metric.set_histogram(histogram);
    metric
}

fn namespaces(page: &Page, instance: &dyn Instance, views: &[View]) -> Result<(), prometheus::Error> {
    let info = page.gauges("walflow_namespace_info", "Who a namespace belongs to", &["ns", "owner", "shard"])?;
    let stale = page.gauges("walflow_config_stale", "1 while a namespace's file is broken", &["ns"])?;
    let parked = page.gauges("walflow_parked_records", "Records that wait for their time", &["ns"])?;
    let known = page.gauges(
        "walflow_idempotency_known_since_timestamp_seconds",
        "From when on every idempotency key is known",
        &["ns"],
    )?;
    let overflowed = page.counters(
        "walflow_backlog_dropped_records_total",
        "Unfinished records that `on_full: drop` has ended",
        &["ns"],
    )?;
    let accepted = page.counters("walflow_accepted_records_total", "Writes that became durable", &["ns"])?;
    let bytes = page.counters("walflow_accepted_bytes_total", "Bytes of their requests", &["ns"])?;
    let refused = page.counters("walflow_refused_records_total", "Writes that were refused", &["ns"])?;
    let count = |counters: &IntCounterVec, ns: &str, count: &AtomicU64| {
        counters.with_label_values(&[ns]).inc_by(count.load(Ordering::Relaxed));
    };
    for view in views {
        let ns = view.namespace.as_str();
        count(&accepted, ns, &view.received.accepted);
        count(&bytes, ns, &view.received.accepted_bytes);
        count(&refused, ns, &view.received.refused);
        let owner = view.plan.owner.as_deref().unwrap_or_default();
        info.with_label_values(&[ns, owner, &view.plan.shard]).set(1);
        stale.with_label_values(&[ns]).set(i64::from(view.config == ConfigState::Stale));
        let counts = view.shelf.counts();
        parked.with_label_values(&[ns]).set(whole(counts.parked));
        overflowed.with_label_values(&[ns]).inc_by(counts.overflowed);
        if let Some(since) = counts.keys_since {
            known.with_label_values(&[ns]).set(since.as_millis() / 1_000);
        }
    }
    for absent in instance.absent() {
        stale.with_label_values(&[absent.namespace.as_str()]).set(1);
    }
    Ok(())
}

fn lags(page: &Page, instance: &dyn Instance, views: &[View]) -> Result<(), prometheus::Error> {
    let records = page.gauges("walflow_branch_lag_records", "Records that a branch has not ended", &BRANCH)?;
    let bytes = page.gauges("walflow_branch_lag_bytes", "Their bytes", &BRANCH)?;
    let seconds = GaugeVec::new(Opts::new("walflow_branch_lag_seconds", "Age of the oldest of them"), &BRANCH)?;
    page.add(&seconds)?;
    let aside =
        page.gauges("walflow_branch_set_aside_records", "Records set aside because their key keeps failing", &BRANCH)?;
    let dead = page.gauges("walflow_branch_dead_letters", "Dead letters that lie there", &BRANCH)?;
    let dead_bytes = page.gauges("walflow_branch_dead_letter_bytes", "Their bytes", &BRANCH)?;
    let paused =
        page.gauges("walflow_branch_paused", "1 while a branch does not send, by cause", &["ns", "branch", "cause"])?;
    let now = instance.clock().now();
    for view in views {
        let ns = view.namespace.as_str();
        let counts = view.shelf.counts();
        for (name, handle) in &view.branches {
            let labels = [ns, name.as_str()];
            let lag = view.log.lag(name);
            records.with_label_values(&labels).set(whole(lag.records));
            bytes.with_label_values(&labels).set(whole(lag.bytes));
            let age = lag.oldest.map_or(0.0, |oldest| now.since(oldest).as_secs_f64());
            seconds.with_label_values(&labels).set(age);
            aside.with_label_values(&labels).set(whole(counts.aside_of(name)));
            let (letters, size) = counts.dead_of(name);
            dead.with_label_values(&labels).set(whole(letters));
            dead_bytes.with_label_values(&labels).set(whole(size));
            let status = handle.board().status();
            for cause in ["breaker", "refused", "dead_letters_full", "dead_letters_copy", "operator"] {
                let here = status.pause.as_ref().is_some_and(|pause| pause.cause == cause);
                paused.with_label_values(&[ns, name.as_str(), cause]).set(i64::from(here));
            }
        }
    }
    Ok(())
}

fn counts(page: &Page, views: &[View]) -> Result<(), prometheus::Error> {
    type Pick = fn(&BranchCounters) -> u64;
    let all: [(&str, &str, Pick); 9] = [
        ("walflow_delivered_records_total", "Deliveries that a target took", |c| c.delivered.load(Ordering::Relaxed)),
        ("walflow_delivered_bytes_total", "Their payload bytes", |c| c.delivered_bytes.load(Ordering::Relaxed)),
        ("walflow_dropped_records_total", "Records that a filter or script ended", |c| {
            c.dropped.load(Ordering::Relaxed)
        }),
        ("walflow_attempts_failed_total", "Failed attempts that may be repeated", |c| {
            c.retried.load(Ordering::Relaxed)
        }),
        ("walflow_attempts_down_total", "Attempts that found the target away", |c| c.down.load(Ordering::Relaxed)),
        ("walflow_set_aside_records_total", "Deliveries set aside because their key kept failing", |c| {
            c.set_aside.load(Ordering::Relaxed)
        }),
        ("walflow_dead_letters_total", "Deliveries that ended in the dead letters", |c| c.dead.load(Ordering::Relaxed)),
        ("walflow_dead_letter_copies_failed_total", "Copies of dead letters that could not be written", |c| {
            c.copies_failed.load(Ordering::Relaxed)
        }),
        ("walflow_branch_restarts_total", "Times that a branch fell over and was started again", |c| {
            c.restarts.load(Ordering::Relaxed)
        }),
    ];
    for (name, help, pick) in all {
        let counters = page.counters(name, help, &BRANCH)?;
        for view in views {
            for (branch, handle) in &view.branches {
                let labels = [view.namespace.as_str(), branch.as_str()];
                counters.with_label_values(&labels).inc_by(pick(&handle.board().counters));
            }
        }
    }
    Ok(())
}
