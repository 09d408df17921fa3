//! From what was written to what it means: defaults filled in, scripts compiled, a branch for each region and sink.
//!
//! Takes a file that was loaded, gives its plan or every reason why there is none. Opens only the scripts and schemas
//! that the file names; never the network, never a log.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::branches::Branches;
use super::epoch;
use super::plan::{Plan, Routing};
use crate::delay::{DEFAULT_MAX, Delay, DelayRule};
use crate::source::BranchName;
use crate::spec::code::Code;
use crate::spec::diagnostic::Diagnostic;
use crate::spec::environment::Environment;
use crate::spec::expand::child;
use crate::spec::sink::ArmSpec;
use crate::spec::text::Text;
use crate::spec::{DelayFor, Loaded, PipelineSpec, StageSpec};
use crate::transform::{
    CompileError, Compiler, Expression, PayloadSchema, Place, Predicate, StageKind, StageSource, Transform,
};

/// What came of a file.
#[derive(Clone, Debug)]
pub struct Made {
    /// The plan, when there is no error.
    pub plan: Option<Plan>,
    /// Everything found, from reading on; warnings too.
    pub diagnostics: Vec<Diagnostic>,
}

/// Makes a file's plan. `environment` is the one that the file was loaded with and the compiler made from.
pub fn make(loaded: &Loaded, environment: &Environment, compiler: &Compiler) -> Made {
    let mut loaded = loaded.clone();
    let Some(spec) = loaded.spec.clone() else {
        return Made { plan: None, diagnostics: loaded.diagnostics };
    };
    let namespace = loaded.namespace.clone();
    let record = usize::try_from(spec.source.limits.record.0).unwrap_or(usize::MAX);
    let compiler = namespace.as_ref().map_or_else(|| compiler.clone(), |namespace| compiler.within(namespace, record));
    let mut maker = Maker { loaded: &loaded, compiler: &compiler, found: Vec::new() };

    let source = maker.source(&spec);
    let delay = maker.delay(&spec);
    let transform = maker.stages("/transform", &spec.transform);
    let routing = maker.routing(&spec);
    let branches = Branches { maker: &mut maker, spec: &spec }.make();
    maker.one_branch(&source, branches.len());
    let retired = spec.retired.keys().map(|name| BranchName::from_stored(name)).collect();
    let mut found = std::mem::take(&mut maker.found);
    loaded.diagnostics.append(&mut found);
    loaded.tidy();

    let plan = match namespace {
        Some(namespace) if !loaded.has_errors() => Some(Plan {
            namespace,
            description: spec.description.clone(),
            owner: spec.owner.clone(),
            shard: spec.shard.clone().unwrap_or_else(|| "default".to_owned()),
            revision: revision(&loaded, &spec, environment),
            files: epoch::keep(&loaded, environment_digest(&loaded, &spec, environment)),
            source,
            delay,
            transform,
            origin: spec.replicate.as_ref().and_then(|replicate| replicate.origin.as_deref()).map(Into::into),
            routing,
            branches: branches.into_iter().map(Arc::new).collect(),
            retired,
            tests: spec.tests.clone(),
        }),
        _ => None,
    };
    Made { plan, diagnostics: loaded.diagnostics }
}

/// Every stage list of a file.
fn all_stages(spec: &PipelineSpec) -> impl Iterator<Item = &StageSpec> {
    let regions = spec.replicate.iter().flat_map(|replicate| replicate.regions.values()).flat_map(|r| &r.transform);
    let route = spec.sink.route.iter().flatten();
    let arms = route.chain(spec.sink.fan_out.iter().flat_map(|arms| arms.values())).flat_map(|arm| &arm.transform);
    spec.transform.iter().chain(regions).chain(arms)
}

/// A digest of every value that came from outside: the references' and the scripts'.
fn environment_digest(loaded: &Loaded, spec: &PipelineSpec, environment: &Environment) -> [u8; 32] {
    let mut used: BTreeMap<&str, Option<&str>> = BTreeMap::new();
    for reference in loaded.expansion.written.values().flat_map(|written| &written.used) {
        used.insert(&reference.name, reference.value.as_deref());
    }
    for name in all_stages(spec).flat_map(|stage| &stage.env) {
        used.insert(name, environment.get(name));
    }
    let mut digest = Sha256::new();
    // The file's own text goes first, so that equal values in two namespaces have digests of their own.
    absorb(&mut digest, loaded.text.as_str());
    if let Some(shared) = loaded.text.behind() {
        // Where it stands in walflow.yaml does not matter.
        shared.as_str().split_whitespace().for_each(|word| absorb(&mut digest, word));
    }
    for (name, value) in used {
        absorb(&mut digest, name);
        absorb(&mut digest, if value.is_some() { "set" } else { "unset" });
        absorb(&mut digest, value.unwrap_or_default());
    }
    digest.finalize().into()
}

fn revision(loaded: &Loaded, spec: &PipelineSpec, environment: &Environment) -> Arc<str> {
    let mut digest = Sha256::new();
    digest.update(environment_digest(loaded, spec, environment));
    for (name, text) in loaded.neighbours.all() {
        absorb(&mut digest, &name);
        absorb(&mut digest, &text);
    }
    hex(digest.finalize().as_slice().get(..6).unwrap_or_default()).into()
}

fn absorb(digest: &mut Sha256, text: &str) {
    digest.update((text.len() as u64).to_le_bytes());
    digest.update(text);
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        use std::fmt::Write as _;
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Compiles and collects what does not.
pub(super) struct Maker<'a> {
    pub(super) loaded: &'a Loaded,
    compiler: &'a Compiler,
    pub(super) found: Vec<Diagnostic>,
}

impl Maker<'_> {
    pub(super) fn schema(&mut self, path: &str) -> Option<Arc<PayloadSchema>> {
        let neighbours = &self.loaded.neighbours;
        let mut read = |path: &Path| neighbours.read(&path.to_string_lossy()).map(String::into_bytes);
        match PayloadSchema::load(Path::new(path), &mut read) {
            Ok(schema) => Some(Arc::new(schema)),
            Err(error) => {
                let help = format!("the path is relative to the pipeline file: {}", neighbours.shown(path));
                let found = self.loaded.diagnostic(Code::SchemaFile, "/source/schema", false, error.to_string());
                self.found.push(found.help(help));
                None
            }
        }
    }

    fn delay(&mut self, spec: &PipelineSpec) -> Option<Delay> {
        let delay = spec.delay.as_ref()?;
        let rule = match (&delay.for_, &delay.until) {
            (Some(DelayFor::Fixed(span)), _) => Some(DelayRule::Fixed(span.0)),
            (Some(DelayFor::Expression(text)), _) => {
                let help = "a duration such as 5s, or an expression that gives seconds";
                self.expression("/delay/for", text, help).map(DelayRule::For)
            }
            (None, Some(text)) => {
                let help = "an expression that gives RFC 3339 text, or seconds since the epoch";
                self.expression("/delay/until", text, help).map(DelayRule::Until)
            }
            (None, None) => None,
        };
        Some(Delay { rule, jitter: delay.jitter.0, max: delay.max.map_or(DEFAULT_MAX, |max| max.0) })
    }

    fn expression(&mut self, pointer: &str, text: &str, help: &str) -> Option<Expression> {
        let name = crate::spec::check::dotted(pointer);
        let compiled = self.compiler.expression(&name, text, &self.place(pointer));
        compiled.map_err(|error| self.not_compiled(pointer, &error, Some(help))).ok()
    }

    /// Compiles a condition.
    pub(super) fn predicate(&mut self, pointer: &str, text: &str) -> Option<Predicate> {
        let name = crate::spec::check::dotted(pointer);
        let compiled = self.compiler.predicate(&name, text, &self.place(pointer));
        compiled.map_err(|error| self.not_compiled(pointer, &error, None)).ok()
    }

    fn place(&self, pointer: &str) -> Place {
        let at = self.loaded.offset_within(pointer, 1, 1);
        let text = &self.loaded.text;
        Place { file: Arc::clone(text.name()), line: text.line_of(at), column: text.column_of(at) }
    }

    fn not_compiled(&mut self, pointer: &str, error: &CompileError, help: Option<&str>) {
        let found =
            self.loaded.diagnostic_within(Code::ScriptError, pointer, error.line, error.column, error.message.as_ref());
        self.found.push(match help {
            Some(help) => found.help(help),
            None => found,
        });
    }

    /// Compiles a list of stages; those that do not compile are reported, each on its own.
    pub(super) fn stages(&mut self, pointer: &str, stages: &[StageSpec]) -> Transform {
        let mut sources = Vec::new();
        for (index, stage) in stages.iter().enumerate() {
            let here = child(pointer, &index.to_string());
            if let Some(source) = self.stage(&here, stage) {
                sources.push(source);
            }
        }
        self.compiler.stages(&sources).unwrap_or_default()
    }

    fn stage(&mut self, here: &str, stage: &StageSpec) -> Option<StageSource> {
        let (key, kind, text) = match (&stage.filter, &stage.inline, &stage.script) {
            (Some(text), _, _) => ("filter", StageKind::Filter, text),
            (_, Some(text), _) => ("inline", StageKind::Script, text),
            (_, _, Some(path)) => return self.script(here, stage, path),
            _ => return None,
        };
        let pointer = child(here, key);
        let source = StageSource {
            name: crate::spec::check::dotted(here).into(),
            kind,
            text: text.as_str().into(),
            place: self.place(&pointer),
            env: stage.env.clone(),
        };
        self.compiled(source, |maker, error| maker.not_compiled(&pointer, error, None))
    }

    /// The stage again when it compiles; each stage on its own, so that every error finds its place.
    fn compiled(
        &mut self,
        source: StageSource,
        mut report: impl FnMut(&mut Self, &CompileError),
    ) -> Option<StageSource> {
        match self.compiler.stages(std::slice::from_ref(&source)) {
            Ok(_) => Some(source),
            Err(errors) => {
                for error in &errors {
                    report(self, error);
                }
                None
            }
        }
    }

    /// A stage whose script has a file of its own.
    fn script(&mut self, here: &str, stage: &StageSpec, path: &str) -> Option<StageSource> {
        let pointer = child(here, "script");
        let shown = self.loaded.neighbours.shown(path);
        let text = match self.loaded.neighbours.read(path) {
            Ok(text) => text,
            Err(error) => {
                let message = format!("the script {path} {error}");
                let found = self.loaded.diagnostic(Code::ScriptFile, &pointer, false, message);
                self.found.push(found.help(format!("the path is relative to the pipeline file: {shown}")));
                return None;
            }
        };
        let source = StageSource {
            name: crate::spec::check::dotted(here).into(),
            kind: StageKind::Script,
            text: text.as_str().into(),
            place: Place { file: shown.as_str().into(), line: 1, column: 1 },
            env: stage.env.clone(),
        };
        let text = Text::new(&shown, &text);
        self.compiled(source, |maker, error| {
            let at = text.offset_at(error.line, error.column);
            let found = Diagnostic::at(Code::ScriptError, &text, &(at..at), error.message.as_ref());
            maker.found.push(found.pointer(&pointer));
        })
    }

    fn routing(&mut self, spec: &PipelineSpec) -> Routing {
        let sink = &spec.sink;
        if let Some(arms) = &sink.route {
            let named = arms
                .iter()
                .enumerate()
                .map(|(index, arm)| (format!("/sink/route/{index}"), arm.name.clone().unwrap_or_default(), arm));
            let arms = self.conditions(named);
            let otherwise = sink.otherwise.unwrap_or(crate::spec::sink::Otherwise::DeadLetter);
            return Routing::Route { arms, otherwise };
        }
        if let Some(arms) = &sink.fan_out {
            let named = arms.iter().map(|(name, arm)| (child("/sink/fan_out", name), name.clone(), arm));
            return Routing::FanOut { arms: self.conditions(named) };
        }
        Routing::Single
    }

    fn conditions<'b>(
        &mut self,
        arms: impl Iterator<Item = (String, String, &'b ArmSpec)>,
    ) -> Arc<[(Arc<str>, Option<Predicate>)]> {
        let compiled = arms.map(|(pointer, name, arm)| {
            let when = arm.when.as_deref().and_then(|text| self.predicate(&child(&pointer, "when"), text));
            (Arc::from(name), when)
        });
        compiled.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{Clock, Timestamp};
    use crate::pipeline::from_epoch;
    use crate::sink::Kind;
    use crate::spec::{Neighbours, load_text};

    const FULL: &str = r#"
namespace: cache
owner: team
source: { key: /key, schema: s.json }
delay: { for: 'payload.wait', max: 1h }
transform:
  - filter: 'payload.ok == true'
  - script: mask.rhai
    env: [SALT]
replicate:
  regions:
    us: { url: "${US}" }
    eu: { url: "redis://eu/2", was: europe, transform: [{ inline: "payload.eu = true;" }] }
sink:
  redis:
    cases:
      - { when: 'payload.gone == true', command: del, key: "c:{key}" }
      - { key: "c:{key}" }
  limits: { rate: 30/m }
"#;

    fn compiler(environment: &Environment) -> Compiler {
        Compiler::new(Clock::manual(Timestamp::from_millis(0)), environment.variables())
    }

    fn environment(us: &str) -> Environment {
        Environment::new([("US", us), ("SALT", "pepper")].map(|(name, value)| (name.to_owned(), value.to_owned())))
    }

    fn neighbours() -> Neighbours {
        let files = [("mask.rhai", "payload.x = 1;"), ("s.json", "{}")];
        Neighbours::kept(files.map(|(name, text)| (name.to_owned(), text.to_owned())).into())
    }

    fn made(yaml: &str, environment: &Environment) -> Made {
        let loaded = load_text(Text::new("p/cache.yaml", yaml), neighbours(), environment);
        make(&loaded, environment, &compiler(environment))
    }

    #[track_caller]
    fn plan(yaml: &str, environment: &Environment) -> Plan {
        let made = made(yaml, environment);
        assert!(made.plan.is_some(), "{}", made.diagnostics.iter().map(|d| d.render(false)).collect::<String>());
        made.plan.unwrap()
    }

    #[test]
    fn branches_are_regions_times_sinks_with_overrides_applied() {
        let plan = plan(FULL, &environment("redis://us/1"));
        let names: Vec<&str> = plan.branches.iter().map(|branch| branch.name.as_str()).collect();
        assert_eq!(names, ["redis@us", "redis@eu"]);
        let urls: Vec<Option<&str>> = plan
            .branches
            .iter()
            .map(|branch| match &branch.kind {
                Kind::Redis(spec) => spec.url.as_deref(),
                _ => None,
            })
            .collect();
        assert_eq!(urls, [Some("redis://us/1"), Some("redis://eu/2")]);
        assert_eq!(plan.branches[1].was.as_ref().map(BranchName::as_str), Some("redis@europe"));
        assert_eq!(plan.branches[0].rate, Some((0.5, 1)));
        assert_eq!(plan.branches[0].cases.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false]);
        assert!(plan.branches[0].transforms[0].is_empty() && !plan.branches[1].transforms[0].is_empty());
    }

    #[test]
    fn a_cluster_is_an_address_also_of_a_region() {
        let yaml = "namespace: a
replicate: { regions: { us: {}, eu: { cluster: [\"${US}\", \"redis://eu-2\"] } } }
sink: { redis: { cluster: [\"redis://us-1\"], cases: [{ key: 'a:{key}' }] } }
";
        let plan = plan(yaml, &environment("redis://eu-1"));
        let nodes: Vec<&[String]> = plan
            .branches
            .iter()
            .map(|branch| match &branch.kind {
                Kind::Redis(spec) => spec.cluster.as_slice(),
                _ => &[],
            })
            .collect();
        assert_eq!(nodes, [&["redis://us-1".to_owned()][..], &["redis://eu-1".to_owned(), "redis://eu-2".to_owned()]]);
        let none = made(&yaml.replace("[\"redis://us-1\"]", "[]"), &environment("redis://eu-1"));
        assert_eq!(none.diagnostics.iter().map(|d| d.code).collect::<Vec<_>>(), [Code::MissingAddress]);
        let unset = made(yaml, &Environment::default());
        assert_eq!(unset.diagnostics.iter().map(|d| d.code).collect::<Vec<_>>(), [Code::UnsetVariable]);
    }

    #[test]
    fn an_epoch_gives_the_same_plan_again_and_holds_no_secret() {
        let env = environment("redis://user:CANARY@us/1");
        let first = plan(FULL, &env);
        assert!(!String::from_utf8_lossy(&first.files).contains("CANARY"));
        assert!(!String::from_utf8_lossy(&first.files).contains("pepper"));
        let again = from_epoch(&first.files, &env, &compiler(&env)).unwrap().plan.unwrap();
        assert_eq!((&again.revision, &again.files), (&first.revision, &first.files));
        assert_eq!(again.branches.len(), 2);
        let bare = Environment::default();
        let stale = from_epoch(&first.files, &bare, &compiler(&bare)).unwrap();
        assert!(stale.plan.is_none());
        assert_eq!(stale.diagnostics[0].code, Code::UnsetVariable);
        assert!(from_epoch(b"{}", &bare, &compiler(&bare)).is_err());
    }

    #[test]
    fn a_plan_and_its_file_show_no_secret_to_whoever_debugs() {
        let http = r#"namespace: hooks
replicate:
  regions:
    us: { url: "https://me:${US}@h/${US}?t=${US}", proxy: "http://me:${US}@p:3128" }
    eu: { headers: { X-Key: "${US}", Authorization: "Bearer ${US}" } }
transform: [{ inline: 'payload.salt = env("SALT");', env: [SALT] }]
sink: { http: { url: "https://${US}@h/", sign: { secret: "whsec_${US}" } } }
"#;
        let secret = "CANARYcanaryCANARYcanaryCANARYcanary";
        for (yaml, us) in [(FULL, format!("redis://me:{secret}@us/1")), (http, secret.to_owned())] {
            let environment = environment(&us);
            let loaded = load_text(Text::new("p/cache.yaml", yaml), neighbours(), &environment);
            let plan = plan(yaml, &environment);
            for shown in
                [format!("{plan:?}"), format!("{plan:#?}"), format!("{loaded:?}"), format!("{:?}", loaded.spec)]
            {
                assert!(!shown.contains("CANARY") && !shown.contains("pepper"), "{shown}");
            }
        }
    }

    #[test]
    fn a_revision_follows_file_scripts_and_environment() {
        let one = plan(FULL, &environment("redis://us/1")).revision;
        assert_eq!(plan(FULL, &environment("redis://us/1")).revision, one);
        assert_ne!(plan(FULL, &environment("redis://us/2")).revision, one);
        assert_ne!(plan(&FULL.replace("1h", "2h"), &environment("redis://us/1")).revision, one);
    }

    #[test]
    fn every_script_that_does_not_compile_is_reported_at_its_line() {
        let yaml = "namespace: a
transform:
  - filter: 'payload.x =='
  - inline: |
      let a = 1;
      let b = ;
  - script: none.rhai
sink: { fan_out: { a: { when: '(', stdout: {} } } }
";
        let made = made(yaml, &Environment::default());
        let found: Vec<(&str, usize)> = made.diagnostics.iter().map(|d| (d.code.as_str(), d.line)).collect();
        assert_eq!(found, [("WF0501", 3), ("WF0501", 6), ("WF0502", 7), ("WF0501", 8)], "{:#?}", made.diagnostics);
    }

    #[test]
    fn overrides_are_checked_at_their_own_place() {
        let single = "namespace: a
replicate:
  regions:
    us: { urk: x }
    eu: { timeout: soon }
    as: { redis: {} }
sink: { redis: { cases: [{ key: 'a:{key}' }] } }
";
        let found: Vec<String> = made(single, &Environment::default())
            .diagnostics
            .iter()
            .map(|d| format!("{} {} {}", d.code, d.line, d.pointer))
            .collect();
        for wanted in [
            "WF0201 4 /replicate/regions/us/urk",
            "WF0205 5 /replicate/regions/eu/timeout",
            "WF0406 6 /replicate/regions/as/redis",
            "WF0407 7 /sink/redis",
        ] {
            assert!(found.iter().any(|found| found == wanted), "{wanted} not in {found:#?}");
        }
        let several = "namespace: a
replicate: { regions: { us: { b: {}, a: { path: us } } } }
sink: { fan_out: { a: { file: { path: x } } } }
";
        let made = made(several, &Environment::default());
        assert_eq!(made.diagnostics[0].code, Code::BadOverride);
    }

    #[test]
    fn what_a_schema_refers_to_is_kept_with_the_file_and_counts_for_its_revision() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        std::fs::create_dir_all(folder.path().join("s/parts")).unwrap();
        write("s/order.json", r#"{"properties":{"zip":{"$ref":"parts/zip.json"}}}"#);
        write("s/parts/zip.json", r#"{"type":"string"}"#);
        let yaml = "namespace: a\nsource: { schema: s/order.json }\nsink: { stdout: {} }\n";
        let planned = |neighbours| {
            let loaded = load_text(Text::new("a.yaml", yaml), neighbours, &Environment::default());
            let made = make(&loaded, &Environment::default(), &compiler(&Environment::default()));
            (made.plan.unwrap(), loaded.neighbours.all())
        };
        let beside = || Neighbours::beside(&folder.path().join("a.yaml"));
        let (plan, files) = planned(beside());
        assert_eq!(files.keys().collect::<Vec<_>>(), ["s/order.json", "s/parts/zip.json"]);
        assert!(plan.source.schema.as_ref().unwrap().check(br#"{"zip":5}"#).is_err());
        let (kept, _) = planned(Neighbours::kept(files));
        assert!(kept.source.schema.as_ref().unwrap().check(br#"{"zip":5}"#).is_err());
        assert_eq!(kept.revision, plan.revision);
        write("s/parts/zip.json", r#"{"type":"integer"}"#);
        let (edited, _) = planned(beside());
        assert!(edited.source.schema.as_ref().unwrap().check(br#"{"zip":5}"#).is_ok());
        assert_ne!(edited.revision, plan.revision);
    }

    #[test]
    fn an_epoch_keeps_what_came_from_walflow_yaml_and_a_change_there_is_a_revision() {
        use crate::spec::load_text_with;
        use crate::spec::shared::Shared;
        let environment = Environment::default();
        let compiler = Compiler::new(crate::clock::Clock::system(), environment.variables());
        let plan = |config: &str| {
            let shared = Shared::of_text(Text::new("walflow.yaml", config), &environment);
            let text = Text::new("a.yaml", "namespace: a\nsink: { http: { url: \"http://h/{key}\" } }\n");
            let loaded = load_text_with(text, neighbours(), Some(&shared), &environment);
            let made = make(&loaded, &environment, &compiler);
            made.plan.unwrap_or_else(|| panic!("{:?}", made.diagnostics))
        };
        let config = "connections:\n  main: { redis: { url: redis://r/1 } }\ndefaults: { sink: { limits: { concurrency: 3 } } }\n";
        let first = plan(config);
        let again = epoch::from_epoch(&first.files, &environment, &compiler).unwrap().plan.unwrap();
        assert_eq!((&again.revision, &again.files), (&first.revision, &first.files));
        assert_eq!(format!("{:?}", again.branches), format!("{:?}", first.branches));
        assert_eq!(plan(&config.replace("redis://r/1", "redis://r/2")).revision, first.revision, "it is not used");
        assert_ne!(plan(&config.replace("concurrency: 3", "concurrency: 4")).revision, first.revision);
        assert!(!String::from_utf8_lossy(&first.files).contains("redis://"));
    }
}
