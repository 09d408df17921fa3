//! Every command of the README works as it stands there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;

use crate::harness::{Place, program, until};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// The fenced blocks of the README in this language.
fn blocks(language: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("README.md")).unwrap();
    let open = format!("```{language}\n");
    text.split(&open).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_readme_do_what_it_says() {
    let blocks = blocks("sh");
    let [start, tests, curl, tail, refuse, mend] = blocks.as_slice() else { panic!("{blocks:#?}") };
    assert!(
        start.contains("apt-get install") && start.contains("cargo run --release --locked -- run examples/quickstart")
    );
    assert!(root().join(tests.trim()).is_file());
    // What the build needs has one list for the tests, and the README names the same.
    let install = fs::read_to_string(root().join("tests/services/install")).unwrap();
    let needed = install.lines().find_map(|line| line.strip_prefix("packages build")).unwrap();
    for package in format!("build{needed}").split_whitespace() {
        assert!(start.split_whitespace().any(|word| word == package), "the README does not install {package}");
    }

    let place = Place::new().arg("examples/quickstart");
    copy(&root().join("examples"), &place.path("examples"));
    fs::create_dir_all(place.path("target/release")).unwrap();
    std::os::unix::fs::symlink(program(), place.path("target/release/walflow")).unwrap();
    let running = place.start().await;
    let address = running.url.trim_start_matches("http://").to_owned();
    let shell = |script: &str| {
        let script = script
            .replace("localhost:3000", &address)
            .replace("pkill -HUP -x walflow", &format!("kill -HUP {}", running.pid()));
        let mut command = Command::new("bash");
        command.args(["-euo", "pipefail", "-c", &script]).current_dir(place.path("")).env("WALFLOW_URL", &running.url);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{script}\n{said}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };

    let answer = shell(curl);
    assert!(answer.contains(r#""durable":"succeeded""#), "{answer}");
    until("both regions", || {
        (place.lines("out/us-east-1.ndjson").len() + place.lines("out/eu-west-1.ndjson").len() == 2).then_some(())
    })
    .await;
    assert_eq!(shell(tail).matches("John Doe").count(), 2);
    until("the screen", || {
        (place.lines("stdout").iter().filter(|line| line.contains("John Doe")).count() == 2).then_some(())
    })
    .await;

    shell(refuse.lines().next().unwrap());
    let list = refuse.lines().nth(1).unwrap();
    until("the dead letters", || (shell(list).matches("a SET needs a value").count() == 4).then_some(())).await;

    let (edit, rest) = mend.split_at(mend.find("target/release").unwrap());
    shell(edit);
    until("the reload", || running.log().contains("read the pipeline files again").then_some(())).await;
    let (replay, tail) = rest.split_once('\n').unwrap();
    assert_eq!(shell(replay).trim(), "replayed 4");
    until("the mended record", || shell(tail).contains("user:7").then_some(())).await;
    running.signal(Signal::TERM);
}

#[test]
fn the_pipeline_files_of_the_readme_and_every_example_are_valid() {
    let yaml = blocks("yaml");
    let [orders, invoices, shared, hop] = yaml.as_slice() else { panic!("{yaml:#?}") };
    let place = Place::new()
        .pipeline("readme.yaml", orders)
        .pipeline("invoices.yaml", invoices)
        .pipeline("hop.yaml", hop)
        .environment("REDIS_PASSWORD", "x");
    let keys = place.path("keys");
    fs::write(&keys, "first,second\n").unwrap();
    let shared = shared.replace("/run/secrets/walflow-keys", &keys.display().to_string());
    fs::write(place.path("walflow.yaml"), shared).unwrap();
    let output = place.command(&["run", "--dry-run", "pipelines"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for folder in ["examples/quickstart", "pipelines"] {
        let output = place.command(&["run", "--dry-run"]).arg(root().join(folder)).output().unwrap();
        assert!(output.status.success(), "{folder}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(!place.path("data").exists(), "a dry run opened the data folder");
}
