//! A TCP proxy whose network can be broken while it runs: what lies between walflow and a server on a bad day.
//!
//! Bytes pass it in two ways: `Up` from client to server, `Down` from server to client. A fault holds for connections that
//! are there and for new ones, until `restore`. A proxy in front of a broker helps only if the broker advertises it.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::servers::free_ports;

/// A way through the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From client to server.
    Up,
    /// From server to client.
    Down,
}

/// What is wrong now.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    cut: bool,
    /// Connections that began under an earlier number are reset.
    resets: u64,
    up: Fault,
    down: Fault,
    latency: Duration,
    /// Bytes a second.
    rate: Option<u32>,
}

/// What happens to the bytes of one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    Passed,
    Held,
    Swallowed,
}

impl Faults {
    fn of(&mut self, way: Way) -> &mut Fault {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }
}

/// A proxy in front of one server; its connections end when it is dropped.
pub struct Proxy {
    address: SocketAddr,
    faults: watch::Sender<Faults>,
    listening: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy in front of `host:port`, which need not be there yet.
    pub async fn start(upstream: &str) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_ports(1)));
        let (faults, seen) = watch::channel(Faults::default());
        let (tell, mut listening) = watch::channel(false);
        let task = tokio::spawn(serve(address, upstream.to_owned(), seen, tell));
        listening.wait_for(|listening| *listening).await.expect("the proxy listens");
        Self { address, faults, listening, task }
    }

    /// Where clients connect, before and after every fault.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Resets all connections and refuses new ones.
    pub async fn cut(&mut self) {
        self.faults.send_modify(|faults| (faults.cut, faults.resets) = (true, faults.resets + 1));
        self.listening.wait_for(|listening| !listening).await.unwrap();
    }

    /// Resets the connections that are there; new ones are fine.
    pub fn reset(&self) {
        self.faults.send_modify(|faults| faults.resets += 1);
    }

    /// Holds the bytes of this way back; they go on after `restore`.
    pub fn stall(&self, way: Way) {
        self.faults.send_modify(|faults| *faults.of(way) = Fault::Held);
    }

    /// Takes the bytes of this way and throws them away: answers that got lost. A connection that lost bytes is reset when
    /// more of them come after `restore`.
    pub fn swallow(&self, way: Way) {
        self.faults.send_modify(|faults| *faults.of(way) = Fault::Swallowed);
    }

    /// Every byte comes that much later, each way.
    pub fn latency(&self, latency: Duration) {
        self.faults.send_modify(|faults| faults.latency = latency);
    }

    /// No more bytes a second than this, each way and for each connection.
    pub fn slow(&self, bytes_per_second: u32) {
        self.faults.send_modify(|faults| faults.rate = Some(bytes_per_second));
    }

    /// Ends all faults.
    pub async fn restore(&mut self) {
        self.faults.send_modify(|faults| *faults = Faults { resets: faults.resets, ..Faults::default() });
        self.listening.wait_for(|listening| *listening).await.unwrap();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    address: SocketAddr,
    upstream: String,
    mut faults: watch::Receiver<Faults>,
    listening: watch::Sender<bool>,
) {
    let mut connections = JoinSet::new();
    while faults.wait_for(|faults| !faults.cut).await.is_ok() {
        let listener = TcpListener::bind(address).await.expect("the proxy's own port");
        listening.send_replace(true);
        loop {
            let client = tokio::select! {
                client = listener.accept() => client,
                _ = faults.wait_for(|faults| faults.cut) => break,
            };
            let Ok((client, _)) = client else { continue };
            let resets = faults.borrow().resets;
            connections.spawn(connect(client, upstream.clone(), faults.clone(), resets));
        }
        drop(listener);
        listening.send_replace(false);
    }
}

async fn connect(mut client: TcpStream, upstream: String, faults: watch::Receiver<Faults>, resets: u64) {
    let Ok(mut server) = TcpStream::connect(&upstream).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let mut reset = faults.clone();
    let whole = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let up = pass(from_client, to_server, Way::Up, faults.clone());
        let down = pass(from_server, to_client, Way::Down, faults);
        tokio::select! {
            ends = async { tokio::try_join!(up, down) } => ends.is_ok(),
            _ = reset.wait_for(|faults| faults.resets != resets) => false,
        }
    };
    if !whole {
        // So that dropping them tells the other side of a reset and not of an end.
        let _ = (client.set_zero_linger(), server.set_zero_linger());
    }
}

/// The bytes of one way, until its end.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    mut faults: watch::Receiver<Faults>,
) -> std::io::Result<()> {
    // What is under way: with latency many pieces are, as on a long line.
    let (send, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(64);
    let latency = faults.clone();
    let read = async move {
        loop {
            let mut bytes = vec![0; 16 * 1024];
            let count = from.read(&mut bytes).await?;
            bytes.truncate(count);
            let due = Instant::now() + latency.borrow().latency;
            if send.send((due, bytes)).await.is_err() || count == 0 {
                return Ok(());
            }
        }
    };
    let write = async move {
        let mut lost = false;
        while let Some((due, bytes)) = arriving.recv().await {
            sleep_until(due).await;
            let passes = |faults: &Faults| *faults.clone().of(way) != Fault::Held;
            let Ok(now) = faults.wait_for(passes).await.map(|faults| *faults) else { break };
            if *now.clone().of(way) == Fault::Swallowed {
                lost = true;
                continue;
            }
            if lost {
                return Err(std::io::ErrorKind::ConnectionReset.into());
            }
            for piece in bytes.chunks(now.rate.map_or(usize::MAX, |rate| (rate as usize / 20).max(1))) {
                if let Some(rate) = now.rate {
                    sleep(Duration::from_secs(piece.len() as u64) / rate).await;
                }
                to.write_all(piece).await?;
            }
            if bytes.is_empty() {
                to.shutdown().await?;
            }
        }
        Ok(())
    };
    tokio::try_join!(read, write).map(drop)
}

mod tests {
    use super::*;
    use std::io::ErrorKind;

    /// Longer than a loopback needs, and short enough to wait for in vain.
    const A_WHILE: Duration = Duration::from_millis(100);

    /// A server that sends everything back, and tells what it got.
    async fn echo() -> (String, mpsc::UnboundedReceiver<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (tell, got) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let tell = tell.clone();
                tokio::spawn(async move {
                    let mut bytes = vec![0; 1024];
                    while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                        let _ = tell.send(bytes[..count].to_vec());
                        stream.write_all(&bytes[..count]).await.unwrap();
                    }
                });
            }
        });
        (address, got)
    }

    async fn ask(stream: &mut TcpStream, text: &str) -> std::io::Result<String> {
        stream.write_all(text.as_bytes()).await?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer).await?;
        Ok(String::from_utf8(answer).unwrap())
    }

    async fn setup() -> (Proxy, TcpStream, mpsc::UnboundedReceiver<Vec<u8>>) {
        let (address, mut got) = echo().await;
        let proxy = Proxy::start(&address).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, "first").await.unwrap(), "first");
        assert_eq!(got.recv().await.unwrap(), b"first");
        (proxy, stream, got)
    }

    fn is_reset<T: std::fmt::Debug>(answer: std::io::Result<T>) -> bool {
        matches!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    }

    #[tokio::test]
    async fn a_cut_resets_what_is_there_and_refuses_what_is_new_until_it_is_restored() {
        let (mut proxy, mut stream, _got) = setup().await;
        proxy.cut().await;
        assert!(is_reset(ask(&mut stream, "x").await));
        assert_eq!(TcpStream::connect(proxy.address()).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        proxy.restore().await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, "again").await.unwrap(), "again");
    }

    #[tokio::test]
    async fn a_reset_ends_only_the_connections_that_are_there() {
        let (proxy, mut stream, _got) = setup().await;
        proxy.reset();
        assert!(is_reset(stream.read_u8().await));
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, "new").await.unwrap(), "new");
    }

    #[tokio::test]
    async fn a_stalled_way_up_holds_what_is_asked_and_lets_it_go_on_later() {
        let (mut proxy, mut stream, mut got) = setup().await;
        proxy.stall(Way::Up);
        stream.write_all(b"held").await.unwrap();
        tokio::time::timeout(A_WHILE, got.recv()).await.expect_err("the server got what is held");
        proxy.restore().await;
        assert_eq!(got.recv().await.unwrap(), b"held");
    }

    #[tokio::test]
    async fn a_stalled_way_down_lets_the_server_have_what_is_asked_and_holds_the_answer() {
        let (mut proxy, mut stream, mut got) = setup().await;
        proxy.stall(Way::Down);
        stream.write_all(b"asked").await.unwrap();
        assert_eq!(got.recv().await.unwrap(), b"asked");
        tokio::time::timeout(A_WHILE, stream.peek(&mut [0])).await.expect_err("the client got what is held");
        proxy.restore().await;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"asked");
    }

    #[tokio::test]
    async fn a_swallowed_answer_never_comes_and_its_connection_is_of_no_more_use() {
        let (mut proxy, mut stream, mut got) = setup().await;
        proxy.swallow(Way::Down);
        stream.write_all(b"asked").await.unwrap();
        assert_eq!(got.recv().await.unwrap(), b"asked");
        tokio::time::timeout(A_WHILE, stream.peek(&mut [0])).await.expect_err("the client got an answer");
        proxy.restore().await;
        assert!(is_reset(ask(&mut stream, "more").await));
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, "new").await.unwrap(), "new");
    }

    #[tokio::test]
    async fn latency_delays_each_way_and_does_not_pile_up() {
        let (proxy, stream, _got) = setup().await;
        proxy.latency(A_WHILE);
        let start = Instant::now();
        let (mut read, mut write) = stream.into_split();
        // Ten pieces in a row: one after the other they would take ten times as long.
        tokio::spawn(async move {
            for _ in 0..10 {
                write.write_all(b"0123456789").await.unwrap();
                tokio::task::yield_now().await;
            }
            std::future::pending::<()>().await;
        });
        read.read_exact(&mut [0; 100]).await.unwrap();
        assert!((A_WHILE * 2..A_WHILE * 8).contains(&start.elapsed()), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn a_slow_line_lets_so_many_bytes_through_in_a_second() {
        let (mut proxy, mut stream, _got) = setup().await;
        proxy.slow(1000);
        let start = Instant::now();
        assert_eq!(ask(&mut stream, &"x".repeat(200)).await.unwrap().len(), 200);
        assert!(start.elapsed() > Duration::from_millis(200), "{:?}", start.elapsed());
        proxy.restore().await;
        assert_eq!(ask(&mut stream, &"x".repeat(20_000)).await.unwrap().len(), 20_000);
    }

    #[tokio::test]
    async fn the_end_of_one_way_passes_and_the_other_goes_on() {
        let (_proxy, mut stream, mut got) = setup().await;
        stream.write_all(b"last").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = String::new();
        stream.read_to_string(&mut rest).await.unwrap();
        assert_eq!((rest.as_str(), got.recv().await.unwrap().as_slice()), ("last", b"last".as_slice()));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_shows_as_a_reset() {
        let proxy = Proxy::start(&format!("127.0.0.1:{}", free_ports(1))).await;
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(is_reset(stream.read_u8().await));
    }
}
