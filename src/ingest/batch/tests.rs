//! A batch is a pipeline: it reads on while groups are made durable, so far and no further, and its answers are true.

use futures::FutureExt as _;
use http::HeaderMap;
use serde_json::{Value, json};

use super::*;
use crate::ingest::testing::{LONG, all_lines, appended, at_rest, body, desk, line, next, next_lines};
use crate::source::AdmitError;

fn upload(desk: &Arc<impl Directory + 'static>, body: Incoming) -> warp::reply::Response {
    batch(Arc::clone(desk) as Arc<dyn Directory>, &HeaderMap::new(), body)
}

fn words<'a>(lines: &'a [Value], name: &str) -> Vec<&'a str> {
    lines.iter().map(|line| line[name].as_str().unwrap_or_default()).collect()
}

#[tokio::test(start_paused = true)]
async fn the_next_lines_are_read_while_a_group_is_made_durable_and_answered_in_order() {
    let (desk, mut log) = desk(1 << 20);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    parts.send(line(1)).await.unwrap();
    let first = next(&mut log).await;
    parts.send(line(2) + line(3).as_str()).await.unwrap();
    let second = next(&mut log).await;
    assert_eq!((first.payloads, second.payloads.len()), (vec![Bytes::from("1")], 2));

    // The second is durable first; what is said of it waits for what is said of the first.
    second.verdict.send(Ok(vec![appended(), Admitted::KeyReused])).unwrap();
    at_rest().await;
    assert!(next_lines(&mut response).now_or_never().is_none(), "answered out of order");
    first.verdict.send(Ok(vec![appended()])).unwrap();
    drop(parts);
    let lines = all_lines(&mut response).await;
    assert_eq!(words(&lines, "durable"), ["succeeded", "succeeded", "failed"]);
    assert_eq!(words(&lines, "code"), ["", "", "key_reused"]);
}

#[tokio::test(start_paused = true)]
async fn only_so_many_groups_are_under_way_and_then_nothing_is_read() {
    let (desk, mut log) = desk(1 << 20);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    let mut handed = Vec::new();
    for number in 0.. {
        // What nobody reads fills the channel, which stands for the connection.
        at_rest().await;
        if parts.try_send(line(number)).is_err() {
            break;
        }
        at_rest().await;
        handed.extend(log.try_recv());
        assert!(number < 1_000, "it reads on and on");
    }
    assert_eq!(handed.len(), MOST_GROUPS);
    handed.remove(0).take();
    at_rest().await;
    parts.try_send(line(0)).expect("an answer makes room");
    drop(parts);
    handed.into_iter().for_each(crate::ingest::testing::Handed::take);
    let rest = tokio::spawn(async move {
        while let Some(more) = log.recv().await {
            more.take();
        }
    });
    assert!(all_lines(&mut response).await.iter().all(|line| line["durable"] == "succeeded"));
    drop((desk, rest));
}

#[tokio::test(start_paused = true)]
async fn after_a_group_that_failed_the_rest_fails_and_what_was_handed_over_is_told_as_it_turned_out() {
    let (desk, mut log) = desk(1 << 20);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    let mut handed = Vec::new();
    for number in 1..=3 {
        parts.send(line(number)).await.unwrap();
        handed.push(next(&mut log).await);
    }
    let [first, second, third] = handed.try_into().ok().unwrap();
    first.refuse(AdmitError::DiskFull);
    second.refuse(AdmitError::Unknown { reason: "the sync failed".into() });
    at_rest().await;
    parts.send(line(4)).await.unwrap();
    at_rest().await;
    third.take();
    parts.send(line(5) + "no JSON\n").await.unwrap();
    drop(parts);
    let lines = all_lines(&mut response).await;
    assert_eq!(words(&lines, "durable"), ["failed", "unknown", "succeeded", "failed", "failed", "failed"]);
    let later = "earlier_line";
    assert_eq!(words(&lines, "code"), ["disk_full", "unknown", "", later, later, later]);
    assert!(log.try_recv().is_err(), "nothing was handed over after that");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_cannot_be_read_is_answered_after_all_before_it_and_ends_the_taking() {
    let (desk, mut log) = desk(1 << 20);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    parts.send(line(1)).await.unwrap();
    let first = next(&mut log).await;
    parts.send(line(2) + "{\"namespace\":\"desk\"}\n" + line(3).as_str()).await.unwrap();
    let second = next(&mut log).await;
    second.take();
    at_rest().await;
    assert!(next_lines(&mut response).now_or_never().is_none(), "answered out of order");
    first.take();
    drop(parts);
    let lines = all_lines(&mut response).await;
    assert_eq!(words(&lines, "durable"), ["succeeded", "succeeded", "failed", "failed"]);
    assert_eq!(words(&lines, "code"), ["", "", "malformed", "earlier_line"]);
    assert!(log.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn its_own_bytes_in_flight_are_waited_for_and_those_of_others_are_not() {
    let (desk, mut log) = desk(line(0).len() as u64);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    parts.send(line(1)).await.unwrap();
    let first = next(&mut log).await;
    parts.send(line(2)).await.unwrap();
    at_rest().await;
    assert!(log.try_recv().is_err(), "there is no room for it");
    first.take();
    next(&mut log).await.take();
    at_rest().await;
    let others = desk.inlet("desk").unwrap().budget.take(2).unwrap();
    parts.send(line(3)).await.unwrap();
    drop(parts);
    let lines = all_lines(&mut response).await;
    assert_eq!(words(&lines, "code"), ["", "", "in_flight"]);
    drop(others);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_its_answers_unread_is_left_after_a_while() {
    let (desk, mut log) = desk(1 << 20);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    let taker = tokio::spawn(async move {
        while let Some(handed) = log.recv().await {
            handed.take();
        }
    });
    let mut sent = 0;
    while tokio::time::timeout(LONG, parts.send(line(sent))).await.expect("it waits for ever").is_ok() {
        sent += 1;
        assert!(sent < 1_000, "it reads on and on");
    }
    let mut lines = Vec::new();
    let end = loop {
        match next_lines(&mut response).await {
            Ok(Some(more)) => lines.extend(more),
            end => break end,
        }
    };
    assert!(end.is_err(), "an answer that is not whole looks whole");
    assert!(!lines.is_empty() && lines.len() < sent as usize, "{} of {sent}", lines.len());
    drop((desk, taker));
}

#[tokio::test(start_paused = true)]
async fn a_line_without_end_is_refused_before_it_is_held() {
    let (desk, _log) = desk(1 << 30);
    let (parts, body) = body();
    let mut response = upload(&desk, body);
    let feeding = async {
        let mut sent = 0;
        while parts.send(" ".repeat(1 << 20)).await.is_ok() {
            sent += 1;
            assert!(sent < 100, "it holds all of it");
        }
    };
    let (lines, ()) = tokio::join!(all_lines(&mut response), feeding);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert_eq!((&lines[0]["code"], &lines[0]["durable"]), (&json!("too_large"), &json!("failed")));
}
