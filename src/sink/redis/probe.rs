//! What a probe says of a Redis server or cluster; it changes nothing there.

use redis::{Pipeline, RedisResult, Value, from_redis_value};

use super::cluster::{Cluster, Node, covered};
use super::connection::Connection;
use super::slots::SLOTS;
use super::verdict::judge;
use crate::clock::{Clock, Timestamp};
use crate::connection::probe::{Probed, skew};

/// Nodes that are looked at one by one, at most; of the rest only the number is told.
const LOOKED_AT: usize = 20;

/// Looks at one server.
pub(super) async fn server(connection: &Connection, clock: &Clock) -> Probed {
    let shown = connection.shown();
    let mut pipeline = Pipeline::new();
    pipeline.ignore_errors().cmd("TIME").cmd("ROLE");
    let answers = match connection.run(&pipeline).await {
        Ok(answers) => answers,
        Err(failure) => return Probed::wrong(shown, failure.message),
    };
    let mut answers = answers.into_iter();
    let time = time(answers.next(), clock);
    let role = answers.next().and_then(|answer| match answer.ok()? {
        Value::Array(parts) => from_redis_value::<String>(parts.into_iter().next()?).ok(),
        _ => None,
    });
    if role.as_deref() == Some("slave") {
        return Probed::wrong(shown, "it is a replica and takes no writes: name its master");
    }
    Probed::fine(shown, format!("it answers; {time}"))
}

/// Looks at a cluster: first at the whole, then at each of its masters.
pub(super) async fn cluster(cluster: &Cluster, clock: &Clock) -> Vec<Probed> {
    let shown = cluster.shown();
    if let Err(failure) = cluster.look().await {
        return vec![Probed::wrong(shown, format!("no node that is named says who serves what; {}", failure.message))];
    }
    let (masters, served) = cluster.masters();
    let looked = masters.iter().take(LOOKED_AT).map(|(node, slots)| master(node, *slots, clock));
    let looked = futures::future::join_all(looked).await;
    let mut states: Vec<String> = looked.iter().filter_map(|(_, state)| state.clone()).collect();
    states.sort_unstable();
    states.dedup();
    // What the nodes say of the whole; they may differ.
    let state = if states.is_empty() { "unknown".to_owned() } else { states.join(" and ") };
    let says = format!("cluster_state:{state}, {}, {} masters", covered(served), masters.len());
    let whole = if state == "ok" && served == SLOTS {
        Probed::fine(shown, says)
    } else {
        let help =
            "look with `redis-cli --cluster check HOST:PORT`, and start what is down or give its slots to others";
        Probed::wrong(shown, format!("{says}: {help}"))
    };
    let mut found = vec![whole];
    found.extend(looked.into_iter().map(|(probed, _)| probed));
    found
}

/// Looks at a master; gives also what it says of the whole.
async fn master(node: &Node, slots: usize, clock: &Clock) -> (Probed, Option<String>) {
    let shown = node.shown();
    let mut pipeline = Pipeline::new();
    pipeline.ignore_errors().cmd("TIME").cmd("CLUSTER").arg("INFO");
    let answers = match node.run(&pipeline).await {
        Ok(answers) => answers,
        Err(failure) => return (Probed::wrong(shown, failure.message), None),
    };
    let mut answers = answers.into_iter();
    let time = time(answers.next(), clock);
    match answers.next() {
        Some(Err(error)) => (Probed::wrong(shown, judge(shown, &error).message), None),
        info => {
            let text = info.and_then(|info| from_redis_value::<String>(info.ok()?).ok()).unwrap_or_default();
            let state = text.lines().find_map(|line| line.strip_prefix("cluster_state:")).map(|state| {
                // What a server says may be anything.
                state.trim().chars().filter(char::is_ascii_alphanumeric).take(20).collect()
            });
            (Probed::fine(shown, format!("it answers; {slots} slots; {time}")), state)
        }
    }
}

fn time(answer: Option<RedisResult<Value>>, clock: &Clock) -> String {
    let time = answer.and_then(|answer| from_redis_value::<(i64, i64)>(answer.ok()?).ok());
    time.map_or("it tells no time".to_owned(), |(seconds, micros)| {
        skew(clock.now(), Timestamp::from_millis(seconds * 1_000 + micros / 1_000))
    })
}
