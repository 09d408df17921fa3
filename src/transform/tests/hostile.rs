//! Scripts that mean harm, or are written by somebody in a hurry: each ends as its record's error, within its bounds.
//!
//! No test waits for the clock: what only the deadline can end gets a short one, everything else a very long one.

use super::*;
use crate::transform::engine;

/// Runs a script whose own deadline is `deadline`.
fn run_within(deadline: Duration, text: &str, payload: &str) -> Result<Outcome, Fault> {
    let source = bare(text);
    let chain =
        compiler().with_deadline(deadline).stages(&[source]).unwrap_or_else(|error| panic!("{text}: {error:?}"));
    chain.run(event(payload))
}

/// What ends the script, which is an error of the record and no accident.
fn ended(text: &str) -> String {
    let message = run_within(PATIENCE, text, "{}").unwrap_err().message.to_string();
    assert!(!message.contains("panic"), "{text}: {message}");
    message
}

#[test]
fn nothing_waits_and_nothing_is_compiled_or_loaded_on_the_way() {
    for text in ["sleep(2);", "sleep(1e300);", "sleep(-1);", "Fn(\"sleep\").call(2);", "2.sleep();", "timestamp();"] {
        assert!(ended(text).contains("not found"), "{text}");
    }
    for text in ["Fn(\"eval\").call(\"payload = 1\");", "call(Fn(\"eval\"), \"1\");"] {
        ended(text);
    }
    for text in ["eval(\"1\");", "import \"x\" as x;", "let f = || eval(\"1\");", "fn f() { import \"x\" as x; }"] {
        let source = bare(text);
        assert!(compiler().stages(&[source]).is_err(), "{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_kept_alive_counts_wherever_it_is_kept() {
    for text in [
        "let all = []; for n in 0..800 { let big = \"\"; big.pad(1000000, 'x'); all.push(|| big.len()); }",
        "let all = #{}; for n in 0..900 { let big = \"\"; big.pad(1000000, 'x'); all[n.to_string()] = big; }",
        "for n in 0..900 { let big = \"\"; big.pad(1000000, 'x'); payload[n.to_string()] = big; }",
        "for n in 0..900 { let big = \"\"; big.pad(1000000, 'x'); headers[n.to_string()] = big; }",
        "let all = [0]; loop { all.append(all); }",
        "let all = [0]; loop { all = all + all; }",
        "let all = #{a: 1}; loop { all = #{a: all, b: all}; }",
        "let text = \"x\"; loop { text = `${text}${text}`; }",
        "let text = \"x\"; loop { text = json_format([text, text]); }",
        "fn f(n) { let big = \"\"; big.pad(4000000, 'x'); f(n + 1); big.len() } f(0);",
        "let big = \"\"; big.pad(60000, 'x'); for n in 0..1000 { emit(#{payload: big}); }",
        "let big = \"\"; big.pad(9000000, 'x'); base64_encode(base64_encode(base64_encode(big)));",
        "let a = blob(100000000);",
        "let all = [1].map(|x| { let big = []; big.pad(100000000, x); big });",
    ] {
        let message = ended(text);
        // The record's limit, or a function that is not there, may come first.
        let bounded = ["32 MiB of memory", "over the limit", "not found"].iter().any(|why| message.contains(why));
        assert!(bounded, "{text}: {message}");
    }
}

#[test]
fn what_only_takes_time_is_ended_by_the_clock_or_by_its_steps() {
    let big = "let text = \"\"; text.pad(60000, 'x'); let all = []; all.pad(20000, 1);";
    for text in [
        "loop { text.index_of(\"xy\"); }",
        "loop { all.index_of(2); }",
        "loop { all.contains(2); }",
        "loop { text.contains(\"xy\"); }",
        "loop { all == all; }",
        "loop { sha512(text); }",
        "loop { regex_match(text, \"(x+x+)+y\"); }",
        "loop { regex_replace(text, \"z\", \"\"); }",
        "loop { try { json_parse(text); } catch { } }",
        "loop { text.split(\"y\"); }",
        "loop { all.sort(); }",
        "loop { all.filter(|n| n == 2); }",
        "loop { all.reverse(); }",
        "while true { try { throw 1; } catch { continue; } }",
        "for a in 0..1000000 { for b in 0..1000000 { } }",
        "let n = 0; do { n += 1; } until n < 0;",
    ] {
        let why = run_within(Duration::from_millis(5), &format!("{big} {text}"), "{}").unwrap_err();
        assert!(why.message.contains("was stopped"), "{text}: {}", why.message);
    }
}

#[test]
fn a_script_that_has_much_in_its_hands_is_looked_at_after_each_step() {
    // One step over a large payload may take as long as thousands of others.
    let at_once = compiler().with_deadline(Duration::ZERO);
    let short = at_once.predicate("when", "payload.n == 1", &place()).unwrap();
    assert!(short.holds(&event(r#"{"n":1}"#)).unwrap(), "this takes fewer steps than there are between two looks");
    let large = format!(r#"{{"n":1,"text":"{}"}}"#, "x".repeat(200_000));
    let why = short.holds(&event(&large)).unwrap_err();
    assert!(why.message.contains("ran for more than 0 ms"), "{}", why.message);
}

#[test]
fn what_calls_itself_is_ended_however_it_does_it() {
    for text in [
        "fn f() { f() } f();",
        "fn f() { g() } fn g() { f() } f();",
        "fn f(x) { [1].map(|y| f(y)) } f(1);",
        "let f = |f| f.call(f); f.call(f);",
        "fn f() { Fn(\"f\").call() } f();",
        "fn f(x) { this.f(x) } payload.f(1);",
        "let a = #{}; a.f = |a| a.f.call(a); a.f.call(a);",
    ] {
        ended(text);
    }
}

#[test]
fn what_is_nested_deep_is_refused_when_it_is_compiled_read_or_written() {
    for text in [
        format!("{}1{};", "(".repeat(10_000), ")".repeat(10_000)),
        format!("{}1{};", "[".repeat(1_000), "]".repeat(1_000)),
        format!("{}{};", "if true { ".repeat(500), "}".repeat(500)),
        format!("payload.a = {}1;", "-".repeat(5_000)),
        format!("payload{};", ".a".repeat(5_000)),
        "fn f() { ".repeat(100),
        "1 + ".repeat(20_000),
    ] {
        compiler().predicate("when", &text, &place()).unwrap_err();
    }
    let nested = format!("payload.a = json_parse(\"{}{}\");", "[".repeat(5_000), "]".repeat(5_000));
    assert!(ended(&nested).contains("nested deeper than 64 levels"));
    assert!(ended("for n in 0..70 { payload = [payload]; }").contains("nested deeper"));
    assert!(ended("let a = 1; for n in 0..70 { a = #{a: a}; } emit(#{payload: a});").contains("nested deeper"));
    assert!(ended("let a = 1; for n in 0..70 { a = [a]; } headers.a = a;").contains("nested deeper"));
    assert!(ended("let a = 1; for n in 0..70 { a = [a]; } sha256(a);").contains("nested deeper"));
    // What holds itself would have no end.
    for text in ["payload.a = || payload; payload.a.call();", "let a = []; let f = || a; a.push(f); payload.a = a;"] {
        ended(text);
    }
}

#[test]
fn a_key_and_headers_that_a_script_makes_are_bounded_as_a_clients_are() {
    assert!(ended("key = \"\"; key.pad(1025, 'x');").contains("a key of 1025 bytes is over the limit of 1024"));
    assert!(
        ended("headers.a = \"\"; headers.a.pad(17000, 'x');").contains("headers are over the limit of 16384 bytes")
    );
    assert!(ended("for n in 0..2000 { headers[`name-${n}`] = n; }").contains("headers are over the limit"));
    let child = "let big = \"\"; big.pad(17000, 'x'); emit(#{payload: 1, headers: #{a: big}});";
    assert!(ended(child).contains("headers are over the limit"));
    assert!(
        ended("let big = \"\"; big.pad(1025, 'x'); emit(#{payload: 1, key: big});").contains("a key of 1025 bytes")
    );
    let fits = script("key = \"\"; key.pad(1024, 'x'); headers.a = \"\"; headers.a.pad(16000, 'x');");
    assert_eq!(delivered(&fits, event("{}"))[0].key.as_ref().unwrap().len(), 1_024);
}

#[test]
fn what_is_emitted_is_bounded_one_by_one_and_altogether() {
    assert!(ended("let a = \"\"; a.pad(70000, 'x'); emit(#{payload: a});").contains("over the limit of 65536"));
    assert!(ended("loop { emit(#{payload: 1}); }").contains("more than 1000 children"));
    let twice = chain(&[
        (StageKind::Script, "for n in 0..40 { emit(#{payload: n}); }"),
        (StageKind::Script, "for n in 0..40 { emit(#{payload: n}); }"),
    ]);
    assert!(twice.run(event("{}")).unwrap_err().message.contains("more than 1000 children"));
}

/// Values that somebody forgot to think of.
const ODD: &[&str] = &[
    "9223372036854775807",
    "-9223372036854775808",
    "1e300",
    "-1e-300",
    "\"\"",
    "\"é😀x\"",
    "[1,\"b\",[]]",
    "{\"a\":1}",
    "null",
    "true",
    "0",
    "-1",
];

/// Calls every function that a script can call, ours and the language's, with every such value in every place.
#[test]
fn no_function_panics_whatever_it_is_given() {
    let mut functions: Vec<(String, usize)> = Vec::new();
    for signature in engine::build().gen_fn_signatures(true) {
        let (name, rest) = signature.split_once('(').unwrap();
        let named = name.rsplit([' ', ':']).next().unwrap_or_default();
        let count = rest.rsplit_once(')').unwrap().0.split(',').filter(|word| !word.trim().is_empty()).count();
        if !named.is_empty() && named.chars().all(|c| c.is_alphanumeric() || c == '_') {
            functions.push((named.to_owned(), count));
        }
    }
    functions.sort();
    functions.dedup();
    for known in ["index_of", "pad", "sub_string", "range", "retain", "to_int", "uuid", "time_add"] {
        assert!(functions.iter().any(|(name, _)| name == known), "{known} is not among {functions:?}");
    }
    for (name, count) in functions {
        let arguments: Vec<String> = (0..count).map(|place| format!("payload[{place}]")).collect();
        let source = bare(&format!("let x = {name}({}); payload = ();", arguments.join(", ")));
        // Words of the language, such as `throw`, are listed as well.
        let Ok(chain) = compiler().stages(&[source]) else { continue };
        // The more places, the fewer values for each, so that it stays within minutes on any machine.
        let values = match count {
            0..=2 => ODD,
            3 => &ODD[..6],
            _ => &ODD[..3],
        };
        for number in 0..values.len().pow(u32::try_from(count).unwrap()) {
            let mut rest = number;
            let mut pick = || {
                let value = values[rest % values.len()];
                rest /= values.len();
                value
            };
            let payload = format!("[{}]", (0..count).map(|_| pick()).collect::<Vec<_>>().join(","));
            if let Err(why) = chain.run(event(&payload)) {
                assert!(!why.message.contains("panic"), "{name} of {payload}: {}", why.message);
            }
        }
    }
}
