//! What every client of SQS shares: region, endpoint, who we are, timeouts, and one set of connections for equal settings.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::{Builder, Credentials};
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::kafka::Shared;

/// Where SQS is and who we are. Stands in a `sqs:` of a source or a sink, or under `connections:`.
#[derive(Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Account {
    /// The region. Default: that of the queue's URL, or the environment's.
    pub region: Option<String>,
    /// Another address than Amazon's: `http://127.0.0.1:9324`.
    pub endpoint: Option<String>,
    /// Who we are. Default: what the AWS tools use too (environment, profile, role of the machine).
    pub access_key_id: Option<String>,
    /// The secret of that key.
    pub secret_access_key: Option<String>,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("region", &self.region).field("at", &self.shown()).finish_non_exhaustive()
    }
}

/// The longest a poll waits for messages, in seconds; SQS allows no more.
pub const LONGEST_POLL: i32 = 20;

/// How long a connection may take, a request, and a request that waits for messages.
const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_secs(LONGEST_POLL.unsigned_abs() as u64 + 10);

impl Account {
    /// What cannot work as written: where (relative to the map that holds these keys), what, and what would be right.
    pub fn faults(&self) -> Vec<(&'static str, String, &'static str)> {
        let mut faults = Vec::new();
        if let Some(endpoint) = &self.endpoint
            && !is_url(endpoint)
        {
            let message = "the endpoint is no http:// or https:// address".to_owned();
            faults.push(("/endpoint", message, "http://127.0.0.1:9324; leave it out for Amazon's own"));
        }
        if self.endpoint.as_ref().is_some_and(|endpoint| endpoint.contains('@')) {
            let message = "the endpoint names a user".to_owned();
            faults.push(("/endpoint", message, "http://127.0.0.1:9324; who we are stands under access_key_id"));
        }
        if self.access_key_id.is_some() != self.secret_access_key.is_some() {
            let message = "access_key_id and secret_access_key belong together".to_owned();
            faults.push(("/access_key_id", message, "give both, or neither and use what the AWS tools use too"));
        }
        faults
    }

    /// The same, with what a queue's URL says of region and endpoint where nothing is written.
    #[must_use]
    pub fn for_queue(&self, queue: &str) -> Self {
        let mut account = self.clone();
        let Some(url) = Some(queue).filter(|queue| is_url(queue)).and_then(|queue| queue.parse::<reqwest::Url>().ok())
        else {
            return account;
        };
        let host = url.host_str().unwrap_or_default();
        let own = host.contains(".amazonaws.com") && !host.contains(".vpce.");
        if !own && account.endpoint.is_none() {
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            account.endpoint = Some(format!("{}://{host}{port}", url.scheme()));
        }
        if account.region.is_none() {
            let mut labels = host.split('.').skip_while(|label| !label.starts_with("sqs"));
            account.region = labels.nth(1).filter(|_| host.contains(".amazonaws.com")).map(str::to_owned);
        }
        account
    }

    /// Where it is, for logs, plans and errors.
    pub fn shown(&self) -> String {
        match (&self.endpoint, &self.region) {
            // What stands before an @ may be a password.
            (Some(endpoint), _) => match endpoint.split_once("://") {
                Some((scheme, rest)) => format!("{scheme}://{}", rest.rsplit('@').next().unwrap_or_default()),
                None => "its endpoint".to_owned(),
            },
            (None, Some(region)) => format!("SQS in {region}"),
            (None, None) => "SQS".to_owned(),
        }
    }

    /// The connection of these settings, shared with everybody who has equal ones. Touches no network.
    pub fn connection(&self) -> Arc<Connection> {
        static CONNECTIONS: Shared<Account, Connection> = Shared::new();
        let made = CONNECTIONS
            .get(self.clone(), || Ok::<_, Infallible>(Connection { account: self.clone(), client: OnceCell::new() }));
        match made {
            Ok(connection) => connection,
        }
    }

    async fn client(&self) -> Result<Client, String> {
        super::tls::provider();
        let times = TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(REQUEST);
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .timeout_config(times.operation_timeout(REQUEST).build())
            // Whoever asks knows whether to repeat: a write that may have arrived is reported, not sent twice in secret.
            .retry_config(RetryConfig::disabled())
            // A poll that waits is no stalled stream, and each request has its time.
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
        if let Some(endpoint) = &self.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        } else if self.endpoint.is_some() && std::env::var_os("AWS_REGION").is_none() {
            // Servers of other people ignore it, and to ask the machine for its region takes seconds.
            loader = loader.region(Region::new("us-east-1"));
        }
        if let (Some(id), Some(secret)) = (&self.access_key_id, &self.secret_access_key) {
            loader = loader.credentials_provider(Credentials::new(id, secret, None, None, "walflow"));
        }
        let config = loader.load().await;
        if config.region().is_none() {
            return Err("no region is known: name one under region, or set AWS_REGION".to_owned());
        }
        Ok(Client::new(&config))
    }
}

/// Connections of one account; made when they are needed.
pub struct Connection {
    account: Account,
    client: OnceCell<Client>,
}

impl Connection {
    /// The client.
    ///
    /// # Errors
    /// When the settings and the environment do not say where to go.
    pub async fn client(&self) -> Result<&Client, String> {
        self.client.get_or_try_init(|| self.account.client()).await
    }

    /// The account.
    pub const fn account(&self) -> &Account {
        &self.account
    }
}

/// What differs for a request that waits for messages: it may take longer than the wait.
pub fn for_polls() -> Builder {
    let times =
        TimeoutConfig::builder().connect_timeout(CONNECT).operation_attempt_timeout(POLL).operation_timeout(POLL);
    aws_sdk_sqs::Config::builder().timeout_config(times.build())
}

/// True when a queue is named by its URL.
pub fn is_url(queue: &str) -> bool {
    queue.strip_prefix("http://").or_else(|| queue.strip_prefix("https://")).is_some_and(|rest| !rest.is_empty())
}

/// The name of a queue that is given by name or URL.
pub fn queue_name(queue: &str) -> &str {
    if is_url(queue) { queue.trim_end_matches('/').rsplit('/').next().unwrap_or_default() } else { queue }
}

/// True when the queue keeps the order of its groups.
pub fn is_fifo(queue: &str) -> bool {
    queue_name(queue).ends_with(".fifo")
}

/// How far a request that failed has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// It was not sent.
    Never,
    /// SQS has refused it: nothing was done.
    Refused,
    /// SQS has refused it for now: we are too fast.
    Throttled,
    /// Nobody can say whether it was done.
    Perhaps,
}

/// Why a request failed, in words for a person.
#[derive(Clone, Debug)]
pub struct Failure {
    /// How far it came.
    pub reached: Reached,
    /// There is no such queue.
    pub no_queue: bool,
    /// What happened and what to do; shows no secret.
    pub text: String,
}

/// What an error of the client means to a person. `action` is the right that the request needs: `SendMessage`.
pub fn explain<E>(error: &SdkError<E>, action: &str, account: &Account, queue: &str) -> Failure
where
    E: ProvideErrorMetadata + StdError + 'static,
{
    let at = account.shown();
    let failure = |reached, text| Failure { reached, no_queue: false, text };
    match error {
        SdkError::TimeoutError(_) => failure(Reached::Perhaps, format!("{at} did not answer in time")),
        SdkError::DispatchFailure(dispatch) => {
            let cause = dispatch.as_connector_error().map_or_else(String::new, |error| innermost(error));
            // No time is set for reading, so what timed out was the connection.
            let never =
                dispatch.is_timeout() || dispatch.as_connector_error().is_some_and(|error| never_connected(error));
            if never {
                return failure(Reached::Never, format!("{at} cannot be reached ({cause}): is the address right?"));
            }
            if dispatch.is_io() {
                return failure(Reached::Perhaps, format!("the connection to {at} broke ({cause})"));
            }
            failure(Reached::Never, no_credentials(&cause))
        }
        SdkError::ConstructionFailure(failed) => failure(Reached::Never, no_credentials(&format!("{failed:?}"))),
        SdkError::ServiceError(refused) => {
            let status = refused.raw().status().as_u16();
            let (code, message) = (error.code().unwrap_or_default(), error.message().unwrap_or_default());
            refusal(code, message, status, action, account, queue)
        }
        _ => failure(Reached::Perhaps, format!("what answers at {at} does not speak SQS: is the address right?")),
    }
}

fn no_credentials(cause: &str) -> String {
    // It lists what was tried, over several lines.
    let cause: String = cause.split_whitespace().flat_map(|word| [word, " "]).collect();
    let cause: String = cause.trim_end().chars().take(120).collect();
    format!(
        "there are no usable credentials: set access_key_id and secret_access_key, or what the AWS tools use ({cause} …)"
    )
}

/// What a refusal means.
fn refusal(code: &str, message: &str, status: u16, action: &str, account: &Account, queue: &str) -> Failure {
    let at = account.shown();
    let is = |names: &[&str]| names.iter().any(|name| code == *name || code.ends_with(&format!(".{name}")));
    let message: String = message.chars().take(300).collect();
    let mut no_queue = false;
    let mut reached = if status >= 500 { Reached::Perhaps } else { Reached::Refused };
    let text = if is(&["NonExistentQueue", "QueueDoesNotExist"]) {
        no_queue = true;
        format!("there is no queue {queue} at {at}; make it: {}", create_command(account, queue))
    } else if is(&["AccessDenied", "AccessDeniedException"]) {
        format!(
            "these credentials lack the right sqs:{action} on queue {queue}: give it in the user's or the queue's policy"
        )
    } else if is(&[
        "InvalidClientTokenId",
        "UnrecognizedClientException",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidSignatureException",
        "MissingAuthenticationToken",
        "MissingAuthenticationTokenException",
        "IncompleteSignature",
        "AuthFailure",
    ]) {
        format!(
            "{at} does not accept these credentials ({code}): is access_key_id right, and its secret, and the region?"
        )
    } else if is(&["ExpiredToken", "ExpiredTokenException", "RequestExpired"]) {
        format!("the credentials have expired, or this machine's clock is wrong ({code})")
    } else if is(&["RequestThrottled", "ThrottlingException", "Throttling", "TooManyRequestsException"]) {
        reached = Reached::Throttled;
        format!("{at} asks us to be slower ({code})")
    } else if code.starts_with("Kms") || code.starts_with("KMS.") {
        format!("the key that encrypts queue {queue} cannot be used ({code}): {message}")
    } else if code.is_empty() {
        format!("{at} answered {status} and not why: is it the address of SQS?")
    } else {
        format!("{at} answered {code} ({status}): {message}")
    };
    Failure { reached, no_queue, text }
}

/// The command that makes a queue.
pub fn create_command(account: &Account, queue: &str) -> String {
    let name = queue_name(queue);
    let mut command = format!("aws sqs create-queue --queue-name {name}");
    if name.ends_with(".fifo") {
        command.push_str(" --attributes FifoQueue=true");
    }
    if let Some(region) = &account.region {
        command.push_str(" --region ");
        command.push_str(region);
    }
    if account.endpoint.is_some() {
        command.push_str(" --endpoint-url ");
        command.push_str(&account.shown());
    }
    command
}

/// The cause below all others.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// True when there was no connection, so nothing was sent.
fn never_connected(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error
            .downcast_ref::<hyper_util::client::legacy::Error>()
            .is_some_and(hyper_util::client::legacy::Error::is_connect)
        {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(endpoint: Option<&str>) -> Account {
        Account {
            endpoint: endpoint.map(str::to_owned),
            access_key_id: Some("AKIA".into()),
            secret_access_key: Some("hush".into()),
            ..Account::default()
        }
    }

    #[test]
    fn a_queue_s_url_says_where_it_is() {
        let of = |url: &str| {
            let account = Account::default().for_queue(url);
            (account.region, account.endpoint)
        };
        assert_eq!(of("https://sqs.eu-west-1.amazonaws.com/1/q"), (Some("eu-west-1".into()), None));
        assert_eq!(of("http://127.0.0.1:9324/000000000000/q"), (None, Some("http://127.0.0.1:9324".into())));
        assert_eq!(
            of("https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com/1/q"),
            (Some("eu-west-1".into()), Some("https://vpce-1.sqs.eu-west-1.vpce.amazonaws.com".into()))
        );
        assert_eq!(of("orders"), (None, None));
        assert_eq!(queue_name("https://sqs.eu-west-1.amazonaws.com/1/orders.fifo"), "orders.fifo");
        assert!(is_fifo("orders.fifo") && !is_fifo("orders"));
    }

    #[test]
    fn no_text_shows_a_secret() {
        let account = account(Some("http://user:hush@example.com:1"));
        assert_eq!(account.shown(), "http://example.com:1");
        assert!(!format!("{account:?}").contains("hush"));
        assert!(!create_command(&account, "q").contains("hush"));
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let account = Account { region: Some("eu-west-1".into()), ..Account::default() };
        let no = |code: &str, status| refusal(code, "x", status, "SendMessage", &account, "orders.fifo");
        let missing = no("AWS.SimpleQueueService.NonExistentQueue", 400);
        assert!(missing.no_queue);
        assert!(
            missing.text.ends_with(
                "aws sqs create-queue --queue-name orders.fifo --attributes FifoQueue=true --region eu-west-1"
            ),
            "{}",
            missing.text
        );
        assert!(no("AccessDenied", 403).text.contains("sqs:SendMessage"));
        assert!(no("InvalidClientTokenId", 403).text.contains("access_key_id"));
        assert_eq!(no("RequestThrottled", 403).reached, Reached::Throttled);
        assert_eq!(no("InternalFailure", 500).reached, Reached::Perhaps);
        assert_eq!(no("InvalidParameterValue", 400).reached, Reached::Refused);
    }

    #[test]
    fn halves_of_a_key_and_odd_endpoints_are_faults() {
        let fault = |account: Account| account.faults().first().map(|fault| fault.0);
        assert_eq!(fault(account(Some("127.0.0.1:9324"))), Some("/endpoint"));
        assert_eq!(fault(account(Some("http://user:hush@127.0.0.1:9324"))), Some("/endpoint"));
        assert_eq!(fault(Account { secret_access_key: None, ..account(None) }), Some("/access_key_id"));
        assert_eq!(fault(account(Some("http://127.0.0.1:9324"))), None);
    }
}
