//! A report as text for people: one fact a line, what branches have in common only once.
//!
//! Takes reports, gives text without colour that reads well at 100 columns. Never decides what is said.

use std::fmt::Write as _;

use super::report::{BranchReport, Fact, Report};

/// The width of the names of facts.
const NAMES: usize = 14;
/// The width at which a fact goes on in the next line.
const WIDTH: usize = 104;

/// Prints one plan.
pub(super) fn plan(report: &Report) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}  ({}, revision {})", report.namespace, report.file, report.revision);
    if let Some(description) = &report.description {
        let _ = writeln!(out, "  {description}");
    }
    let owner = report.owner.as_deref().map_or_else(|| "no owner".to_owned(), |owner| format!("owner {owner}"));
    let _ = writeln!(out, "  {owner}, shard {}", report.shard);
    section(&mut out, "source", &report.source);
    section(&mut out, "delay", &report.delay);
    list(&mut out, "transform", &report.transform);
    list(&mut out, "routing", &report.routing);
    for (index, branch) in report.branches.iter().enumerate() {
        let earlier = report.branches.get(..index).unwrap_or_default();
        print_branch(&mut out, branch, earlier.iter().find(|other| alike(other, branch)));
    }
    if !report.retired.is_empty() {
        let _ = writeln!(out, "\n  retired: {} (what is left there is dropped, counted)", report.retired.join(", "));
    }
    list(&mut out, "from walflow.yaml", &report.inherited);
    if report.tests > 0 {
        let _ = writeln!(out, "\n  {}", count(report.tests, "test case", "test cases"));
    }
    out
}

/// A number with its noun.
pub(super) fn count(number: usize, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// Two branches of one sink: most of what they say is the same.
fn alike(a: &BranchReport, b: &BranchReport) -> bool {
    let sink = |branch: &BranchReport| branch.name.split('@').next().unwrap_or_default().to_owned();
    a.kind == b.kind && sink(a) == sink(b)
}

fn print_branch(out: &mut String, branch: &BranchReport, like: Option<&BranchReport>) {
    let region = branch.region.as_ref().map_or(String::new(), |region| format!(" in {region}"));
    let _ = writeln!(out, "\n  branch {}  ({}{region})", branch.name, branch.kind);
    match like {
        None => facts(out, branch.facts.iter()),
        Some(like) => {
            facts(out, branch.facts.iter().filter(|fact| !like.facts.contains(fact)));
            let missing = like
                .facts
                .iter()
                .filter(|fact| !branch.facts.contains(fact) && !branch.facts.iter().any(|mine| mine.name == fact.name));
            for fact in missing {
                line(out, fact.name, "none");
            }
            line(out, "else", &format!("as {}", like.name));
        }
    }
}

fn section(out: &mut String, title: &str, all: &[Fact]) {
    let _ = writeln!(out, "\n  {title}");
    facts(out, all.iter());
}

fn list(out: &mut String, title: &str, lines: &[String]) {
    if lines.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n  {title}");
    for line in lines {
        wrapped(out, "    ", line);
    }
}

fn facts<'a>(out: &mut String, facts: impl Iterator<Item = &'a Fact>) {
    let mut last = "";
    for fact in facts {
        line(out, if fact.name == last { "" } else { fact.name }, &fact.says);
        last = fact.name;
    }
}

fn line(out: &mut String, name: &str, says: &str) {
    wrapped(out, &format!("    {name:<NAMES$}"), says);
}

/// A text behind a head, going on under itself.
fn wrapped(out: &mut String, head: &str, text: &str) {
    let indent = head.chars().count();
    let mut column = indent;
    out.push_str(head);
    for (index, word) in text.split(' ').enumerate() {
        let width = word.chars().count();
        if index > 0 {
            if column + 1 + width > WIDTH {
                out.push('\n');
                out.push_str(&" ".repeat(indent));
                column = indent;
            } else {
                out.push(' ');
                column += 1;
            }
        }
        out.push_str(word);
        column += width;
    }
    out.push('\n');
}
