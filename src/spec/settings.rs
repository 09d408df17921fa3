//! The service's own settings: each is a flag of `walflow run`, with an environment twin and a key of walflow.yaml.
//!
//! One struct is the list: clap takes the flags from it, schemars the grammar of the file. What the file says lies under
//! the flags as their default, so clap settles who wins: flag, environment, file, default. Never reads anything.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, ValueEnum};
use schemars::JsonSchema;
use serde_json::{Map, Value, json};
use tracing_subscriber::EnvFilter;

use super::check::{Finding, check_file, nearest};
use super::code::Code;
use super::environment::Environment;
use super::expand::{child, core_type, expand_tree};
use super::load::Loaded;
use super::tree::{Content, Entry, Node};
use crate::units::Span;

/// Settings of one instance.
#[derive(Clone, Debug, Args, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct ServiceSpec {
    /// Pipeline files, and folders of them
    #[arg(env = "WALFLOW_PATHS", default_value = "pipelines/", value_delimiter = ',')]
    pub paths: Vec<PathBuf>,
    /// Run only the namespaces of these shards, comma-separated or repeated. Default: all
    #[arg(long, env = "WALFLOW_SHARD", value_delimiter = ',', value_name = "NAME")]
    pub shard: Vec<String>,
    /// Where to listen; without API keys only on loopback
    #[arg(long, env = "WALFLOW_LISTEN", default_value = "127.0.0.1:3000", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Another port than that of --listen
    #[arg(long, env = "PORT")]
    pub port: Option<u16>,
    /// The folder that holds the log
    #[arg(long, env = "WALFLOW_DATA", default_value = "./data", value_name = "FOLDER")]
    pub data: PathBuf,
    /// Do not start when any file has a problem
    #[arg(long, env = "WALFLOW_STRICT")]
    pub strict: bool,
    /// How long a stop lets what is under way end
    #[arg(long, env = "WALFLOW_SHUTDOWN_TIMEOUT", default_value = "25s", value_name = "DURATION")]
    pub shutdown_timeout: Span,
    /// API keys, comma-separated; every caller needs one of them. Better given in the environment
    #[arg(long, env = "VALID_API_KEYS", hide_env_values = true, value_delimiter = ',', value_name = "KEYS")]
    pub api_keys: Vec<String>,
    /// Write the address that is listened on to this file
    #[arg(long, env = "WALFLOW_ADDRESS_FILE", value_name = "FILE")]
    pub address_file: Option<PathBuf>,
    /// How log lines look; auto = text on a terminal, else json
    #[arg(long, env = "WALFLOW_LOG_FORMAT", value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or by module: info,walflow::sink=debug
    #[arg(long, env = "WALFLOW_LOG_LEVEL", default_value = "info", value_name = "LEVEL", value_parser = log_level)]
    pub log_level: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, JsonSchema)]
#[schemars(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text on a terminal, else JSON
    #[default]
    Auto,
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// A word alone would be taken for a module of which everything is logged, and nothing else.
fn log_level(text: &str) -> Result<String, String> {
    const LEVELS: &[&str] = &["error", "warn", "info", "debug", "trace", "off"];
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    let is_word = |part: &&str| !part.contains(['=', ':', '[']) && part.parse::<u8>().is_err();
    let known = |part: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(part));
    match text.split(',').map(str::trim).filter(is_word).find(|part| !known(part)) {
        None => Ok(text.to_owned()),
        Some(part) => Err(match nearest(part, LEVELS.iter().copied()) {
            Some(meant) => format!("'{part}' is no level, did you mean '{meant}'?"),
            None => format!("'{part}' is no level; for a module write {part}=debug"),
        }),
    }
}

/// The flags without a verb around them.
fn arguments() -> Command {
    ServiceSpec::augment_args(Command::new("walflow"))
}

static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
    let mut schema = schemars::schema_for!(ServiceSpec).to_value();
    if let Some(map) = schema.as_object_mut() {
        map.shift_remove("required");
    }
    let arguments = arguments();
    for (key, property) in schema.get_mut("properties").and_then(Value::as_object_mut).into_iter().flatten() {
        let Some(property) = property.as_object_mut() else { continue };
        let argument = arguments.get_arguments().find(|argument| argument.get_id() == key);
        let default = argument.and_then(|argument| argument.get_default_values().first()?.to_str());
        let is_bool = property.get("type").is_some_and(|kind| kind == "boolean");
        let default = default.or(is_bool.then_some("false"));
        if let (Some(default), Some(says)) = (default, property.get("description").and_then(Value::as_str)) {
            let says = format!("{says}. Default: {default}.");
            property.insert("description".to_owned(), json!(says));
            property.insert("default".to_owned(), if is_bool { core_type(default) } else { json!(default) });
        }
    }
    schema
});

/// The grammar of these keys.
pub fn schema() -> &'static Value {
    &SCHEMA
}

/// The keys, in order.
pub fn keys() -> impl Iterator<Item = &'static str> {
    super::grammar::properties(schema()).map(|(key, _)| key)
}

fn is_list(key: &str) -> bool {
    let property = schema().get("properties").and_then(|all| all.get(key));
    property.and_then(|property| property.get("type")).is_some_and(|kind| kind == "array")
}

/// What walflow.yaml says of one setting.
#[derive(Clone)]
struct Said {
    /// As a flag would have it; may hold secrets.
    values: Vec<String>,
    /// As it stands in the file.
    written: Vec<String>,
    place: String,
}

/// What walflow.yaml says of the service's own settings, by key.
#[derive(Clone, Default)]
pub struct InFile(BTreeMap<String, Said>);

impl fmt::Debug for InFile {
    /// Shows the keys: a value may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl InFile {
    /// Reads the keys of the file that are settings; what is wrong with them is told, and they are left out.
    pub(super) fn read(
        loaded: &mut Loaded,
        entries: &[Entry],
        environment: &Environment,
        findings: &mut Vec<Finding>,
    ) -> Self {
        let entries: Vec<Entry> = entries.iter().filter(|entry| keys().any(|key| key == entry.key)).cloned().collect();
        let root = Node { content: Content::Map(entries.clone()), range: 0..0 };
        let mut expansion = expand_tree(&loaded.text, &root, environment);
        let unknown: Vec<String> = expansion.problems.iter().map(|problem| problem.pointer.clone()).collect();
        loaded.diagnostics.append(&mut expansion.problems);
        let mut value = std::mem::take(&mut expansion.value);
        let mut lists = Map::new();
        // A list may be one text, as its flag has it.
        for (key, value) in value.as_object_mut().into_iter().flatten().filter(|(key, _)| is_list(key)) {
            let whole = expansion.written.get(&child("", key)).and_then(|written| written.whole.clone());
            if let Some(text) = whole.map(Value::String).or_else(|| value.is_string().then(|| value.clone())) {
                lists.insert(key.clone(), text);
                *value = Value::Null;
            }
        }
        findings.extend(check_file(schema(), &mut value, &unknown, &expansion.written).findings);
        loaded.expansion.written.extend(expansion.written);

        let arguments = arguments();
        let mut out = BTreeMap::new();
        for (key, value) in value.as_object().into_iter().flatten() {
            let values = texts(lists.get(key).unwrap_or(value));
            let argument = arguments.get_arguments().find(|argument| argument.get_id() == key);
            let entry = entries.iter().find(|entry| entry.key == *key);
            let (Some(values), Some(argument), Some(entry)) = (values, argument, entry) else { continue };
            if let Some(why) = refused(argument, &values) {
                let says = argument.get_help().map(ToString::to_string);
                let default = argument.get_default_values().first().and_then(|default| default.to_str());
                let help = match (says, default) {
                    (Some(says), Some(default)) => Some(format!("{says}. Default: {default}.")),
                    (says, _) => says,
                };
                let message = format!("'{key}': {why}");
                let (code, pointer) = (Code::WrongValue, child("", key));
                findings.push(Finding { code, pointer, at_key: false, message, help });
                continue;
            }
            let place = format!("{}:{}", loaded.text.name(), loaded.text.line_of(entry.key_range.start));
            out.insert(key.clone(), Said { values, written: written(&entry.node), place });
        }
        Self(out)
    }

    /// The command with what the file says in the place of its defaults.
    #[must_use]
    pub fn under(&self, command: Command) -> Command {
        self.0.iter().fold(command, |command, (key, said)| {
            command.mut_arg(key, |argument| argument.default_values(said.values.clone()))
        })
    }

    /// The values of a key, or those that it has by default.
    fn values(&self, argument: &Arg) -> Vec<String> {
        let default = || argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned());
        self.0.get(argument.get_id().as_str()).map_or_else(|| default().collect(), |said| said.values.clone())
    }
}

/// A value as a flag would have it; `None` = nothing is said.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Null | Value::Object(_) => None,
        Value::Array(items) => Some(items.iter().filter_map(texts).flatten().collect()),
        Value::String(text) => Some(vec![text.clone()]),
        other => Some(vec![other.to_string()]),
    }
}

/// The scalars of a node as they are written.
fn written(node: &Node) -> Vec<String> {
    match &node.content {
        Content::Scalar { text, .. } => vec![text.clone()],
        Content::List(items) => items.iter().flat_map(written).collect(),
        Content::Map(_) => Vec::new(),
    }
}

/// Why the flag would not take these values.
fn refused(argument: &Arg, values: &[String]) -> Option<String> {
    let argument = argument.clone().env(None::<&'static str>).default_values(values.to_vec());
    let error = Command::new("walflow").arg(argument).try_get_matches_from(["walflow"]).err()?;
    Some(error.source().map_or_else(|| error.kind().to_string(), ToString::to_string))
}

/// Where the value of a setting came from, the weakest first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody said it.
    Default,
    /// walflow.yaml: file and line.
    File(String),
    /// The name of the environment variable.
    Environment(String),
    /// The flag.
    Flag(String),
}

impl Origin {
    /// True for what a file cannot change.
    const fn is_above_file(&self) -> bool {
        matches!(self, Self::Environment(_) | Self::Flag(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(place) => f.write_str(place),
            Self::Environment(name) | Self::Flag(name) => f.write_str(name),
        }
    }
}

/// One setting in force.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its key.
    pub key: String,
    /// Its value, a list for what may be several; secrets are masked, what came from the file is as it is written there.
    pub value: Value,
    /// Where it came from.
    pub origin: Origin,
}

/// The settings in force, each with its origin.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    /// Those that have a value, in order.
    pub held: Vec<Held>,
    /// What is to be compared with a later state of the file; without what is above the file.
    file: InFile,
    above: Vec<String>,
}

impl InForce {
    /// What these arguments say, of a command that was made by [`InFile::under`].
    pub fn new(matches: &ArgMatches, file: &InFile) -> Self {
        let arguments = arguments();
        let mut out = Self { file: file.clone(), ..Self::default() };
        for key in keys() {
            let Some(argument) = arguments.get_arguments().find(|argument| argument.get_id() == key) else { continue };
            let said = file.0.get(key);
            let origin = match (matches.value_source(key), said) {
                (Some(ValueSource::CommandLine), _) => {
                    Origin::Flag(argument.get_long().map_or_else(|| key.to_uppercase(), |long| format!("--{long}")))
                }
                (Some(ValueSource::EnvVariable), _) => Origin::Environment(
                    argument.get_env().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
                ),
                (_, Some(said)) => Origin::File(said.place.clone()),
                _ => Origin::Default,
            };
            if origin.is_above_file() {
                out.above.push(key.to_owned());
            }
            let raw = matches.get_raw(key).into_iter().flatten().map(|value| value.to_string_lossy().into_owned());
            let mut values: Vec<String> = raw.filter(|value| !value.is_empty()).collect();
            let written = said.filter(|said| matches!(origin, Origin::File(_)) && refers(&said.written));
            if let Some(said) = written {
                values.clone_from(&said.written);
            } else if argument.is_hide_env_values_set() {
                values = vec!["***".to_owned(); values.len()];
            }
            if !values.is_empty() {
                out.held.push(Held { key: key.to_owned(), value: typed(key, values), origin });
            }
        }
        // The file's port is not meant for an address that somebody above it gives as a whole.
        if matches!(out.origin("port"), Origin::File(_)) && out.origin("listen").is_above_file() {
            out.held.retain(|held| held.key != "port");
        }
        out
    }

    fn origin(&self, key: &str) -> Origin {
        self.held.iter().find(|held| held.key == key).map_or(Origin::Default, |held| held.origin.clone())
    }

    /// The address to listen on.
    pub fn address(&self, settings: &ServiceSpec) -> SocketAddr {
        let mut address = settings.listen;
        if let Some(port) = settings.port.filter(|_| self.held.iter().any(|held| held.key == "port")) {
            address.set_port(port);
        }
        address
    }

    /// The keys to which the file now gives another value than the one in force.
    pub fn changed(&self, now: &InFile) -> Vec<String> {
        let arguments = arguments();
        let changed = arguments.get_arguments().filter(|argument| {
            let above = self.above.iter().any(|key| argument.get_id() == key);
            !above && self.file.values(argument) != now.values(argument)
        });
        changed.map(|argument| argument.get_id().to_string()).collect()
    }
}

fn refers(written: &[String]) -> bool {
    written.iter().any(|text| text.contains("${"))
}

/// Texts as the key's own type.
fn typed(key: &str, values: Vec<String>) -> Value {
    let property = schema().get("properties").and_then(|all| all.get(key)).unwrap_or(&Value::Null);
    let is_text = |kind: &Value| *kind == json!("string");
    match property.get("type") {
        Some(kind) if kind == "array" => json!(values),
        Some(kind) if !is_text(kind) => values.first().map_or(Value::Null, |text| core_type(text)),
        _ => json!(values.first()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::shared::Shared;
    use crate::spec::text::Text;
    use crate::spec::{service_json, service_text};

    fn file(yaml: &str) -> Shared {
        let environment = Environment::new([("KEYS", "CANARY-1,CANARY-2")].map(|(n, v)| (n.to_owned(), v.to_owned())));
        Shared::of_text(Text::new("walflow.yaml", yaml), &environment)
    }

    /// As clap reads flags over a file; without environment twins, since those are the process's own.
    fn held(shared: &Shared, flags: &[&str]) -> (ServiceSpec, InForce) {
        let bare = arguments().mut_args(|argument| argument.env(None::<&'static str>));
        let words = std::iter::once("walflow").chain(flags.iter().copied());
        let matches = shared.settings.under(bare).get_matches_from(words);
        let spec = <ServiceSpec as clap::FromArgMatches>::from_arg_matches(&matches).unwrap();
        (spec, InForce::new(&matches, &shared.settings))
    }

    #[test]
    fn a_flag_goes_before_the_file_and_the_file_before_the_default() {
        let shared = file(
            "paths: [a, b]\nshard: x,y\nlisten: 127.0.0.1:9\nstrict: true\nshutdown_timeout: 3\nlog_format: json\napi_keys: ${KEYS}\n",
        );
        assert!(shared.diagnostics.is_empty(), "{:?}", shared.diagnostics);
        let (spec, in_force) = held(&shared, &["--listen", "127.0.0.1:8", "--shard", "z"]);
        assert_eq!((spec.listen.port(), spec.shard, spec.strict), (8, vec!["z".to_owned()], true));
        assert_eq!((spec.paths.len(), spec.log_format, spec.api_keys.len()), (2, LogFormat::Json, 2));
        assert_eq!(spec.shutdown_timeout.0, std::time::Duration::from_secs(3));
        assert_eq!(spec.data, PathBuf::from("./data"));
        let origin = |key: &str| in_force.origin(key).to_string();
        assert_eq!(
            [origin("listen"), origin("strict"), origin("data")],
            ["--listen", "walflow.yaml:4", "default"].map(str::to_owned)
        );
    }

    #[test]
    fn a_port_of_the_file_leaves_an_address_of_a_flag_alone() {
        let shared = file("port: 7\n");
        for (flags, port) in
            [(&[][..], 7), (&["--listen", "127.0.0.1:8"], 8), (&["--listen=127.0.0.1:8", "--port=9"], 9)]
        {
            let (spec, in_force) = held(&shared, flags);
            assert_eq!(in_force.address(&spec).port(), port, "{flags:?}");
        }
    }

    #[test]
    fn what_is_in_force_is_shown_with_its_origin_and_without_secrets() {
        let shared = file(
            "api_keys: [CANARY-3]\nport: 7\nconnections:\n  main: { sqs: { secret_access_key: CANARY-4 } }\ndefaults: { owner: me }\n",
        );
        assert!(shared.diagnostics.is_empty(), "{:?}", shared.diagnostics);
        let in_force = held(&shared, &["--data", "d"]).1;
        let (text, json) = (service_text(&in_force, Some(&shared)), service_json(&in_force, Some(&shared)));
        assert!(!text.contains("CANARY") && !json.to_string().contains("CANARY"), "{text}{json}");
        for line in [
            "data: d                              # --data",
            "port: 7                              # walflow.yaml:2",
            "log_level: info                      # default",
            "  - \"***\"                            # walflow.yaml:1",
            "  owner: me                          # walflow.yaml:5",
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line}\n{text}");
        }
        let value: Value = serde_yaml::from_str(&text).unwrap();
        assert_eq!(
            (&value["port"], &value["connections"]["main"]["sqs"]["secret_access_key"]),
            (&json!(7), &json!("********"))
        );
        let of = |pointer: &str| json["values"].as_array().unwrap().iter().find(|value| value["pointer"] == pointer);
        assert_eq!(of("/port").unwrap()["origin"], "walflow.yaml:2", "{json}");
        let nothing = InForce::default();
        assert_eq!(service_text(&nothing, None), "");
        // A reference is shown as it is written.
        let shared = file("api_keys: ${KEYS}\n");
        let text = service_text(&held(&shared, &[]).1, Some(&shared));
        assert!(text.contains("${KEYS}") && !text.contains("CANARY"), "{text}");
    }

    #[test]
    fn a_later_file_is_compared_with_what_is_in_force() {
        let in_force = held(&file("data: a\nstrict: true\nlisten: 127.0.0.1:1\n"), &["--listen", "127.0.0.1:2"]).1;
        let changed = |yaml: &str| in_force.changed(&file(yaml).settings);
        assert!(changed("listen: 127.0.0.1:3\ndata: a\nstrict: true\nlog_level: info\n").is_empty());
        assert_eq!(changed("data: b\n"), ["data", "strict"]);
    }

    #[test]
    fn a_level_is_a_level() {
        for fine in ["info", "WARN", "info,walflow::sink=debug", "walflow=trace", "off", "3"] {
            assert!(log_level(fine).is_ok(), "{fine}");
        }
        assert!(log_level("debgu").unwrap_err().contains("did you mean 'debug'?"));
        assert!(log_level("info,walflow").unwrap_err().contains("walflow=debug"));
    }
}
