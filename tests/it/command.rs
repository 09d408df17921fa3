//! The command line of an instance: what it listens on, whom it lets in, when it refuses to run, and how it ends.

use std::fs;
use std::process::Output;

use crate::harness::{Place, until_status};

const PIPELINE: &str = "namespace: calm\nsink: { file: { path: out.ndjson } }\n";

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_would_run_nothing_says_what_to_do_and_leaves_nothing_behind() {
    let place = Place::new();
    fs::create_dir(place.path("empty")).unwrap();
    for path in ["empty", "no/such/path"] {
        let output = place.command(&["run", path, "--listen", "127.0.0.1:0"]).output().unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(78), "{said}");
        assert!(said.contains(path) && said.contains("walflow run PATH"), "{said}");
        assert!(!place.path("data").exists(), "{path}: a data folder was made");
    }

    // What an earlier run left behind is delivered without its file.
    let place = place.pipeline("p.yaml", PIPELINE);
    let mut running = place.start().await;
    let paused = running.cli(&place, &["branch", "pause", "calm", "file"]);
    assert_eq!(paused.0, 0, "{}", paused.2);
    running.accepted("calm", None, serde_json::json!(1)).await;
    assert!(running.stop().await.success());
    fs::remove_file(place.path("pipelines/p.yaml")).unwrap();
    let mut running = place.start().await;
    let resumed = running.cli(&place, &["branch", "resume", "calm", "file"]);
    assert_eq!(resumed.0, 0, "{}", resumed.2);
    until_status(&running, "calm", "the rest", |status| status["branches"][0]["lagRecords"] == 0).await;
    assert_eq!(place.lines("out.ndjson"), ["1"]);

    // A folder that knows no namespace any more has nothing to run either.
    let deleted = running.cli(&place, &["namespace", "delete", "calm", "--yes"]);
    assert_eq!(deleted.0, 0, "{}", deleted.2);
    assert!(running.stop().await.success());
    let output = place.command(&["run", "pipelines", "--listen", "127.0.0.1:0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{}", said(&output));
}
