//! A client that is made anew once it is of no use any more: after a fatal error a producer refuses everything for ever.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::error::KafkaError;

/// A client whose maker is new gets so long before it is replaced again: what ends each at once ends the next too.
const SPACING: Duration = Duration::from_secs(1);

type Make<T> = Box<dyn Fn() -> Result<T, KafkaError> + Send + Sync>;

/// A client, and how to make another.
pub struct Lasting<T: Send + Sync + 'static> {
    make: Make<T>,
    current: Mutex<Current<T>>,
}

struct Current<T> {
    client: Arc<T>,
    renewed: Option<Instant>,
}

impl<T: Send + Sync + 'static> Lasting<T> {
    /// Makes the first.
    ///
    /// # Errors
    /// What making it said.
    pub fn new(make: impl Fn() -> Result<T, KafkaError> + Send + Sync + 'static) -> Result<Self, KafkaError> {
        let client = Arc::new(make()?);
        Ok(Self { make: Box::new(make), current: Mutex::new(Current { client, renewed: None }) })
    }

    /// The client of now.
    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.current.lock().client)
    }

    /// The client of now, or another in its place if it is `spent`. One that was replaced a moment ago stays.
    ///
    /// # Errors
    /// What making another said; the spent one stays, and the next call tries again.
    pub fn fresh(&self, spent: impl FnOnce(&T) -> bool) -> Result<Arc<T>, KafkaError> {
        let mut current = self.current.lock();
        let too_soon = current.renewed.is_some_and(|at| at.elapsed() < SPACING);
        if too_soon || !spent(&current.client) {
            return Ok(Arc::clone(&current.client));
        }
        let client = Arc::new((self.make)()?);
        current.renewed = Some(Instant::now());
        let former = std::mem::replace(&mut current.client, Arc::clone(&client));
        drop(current);
        let_go(former);
        Ok(client)
    }
}

/// Lets a client go that may have been replaced: whoever is the last to hold it must not wait for its end.
pub fn let_go<T: Send + Sync + 'static>(client: Arc<T>) {
    if let Some(client) = Arc::into_inner(client) {
        // Ending it takes until its threads have ended. Where no thread can be had it takes that long here.
        let _ = std::thread::Builder::new().name("kafka-end".to_owned()).spawn(move || drop(client));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn a_spent_client_is_replaced_once_and_not_again_at_once() {
        let made = AtomicU32::new(0);
        let clients = Lasting::new(move || Ok(made.fetch_add(1, Ordering::Relaxed))).unwrap();
        assert_eq!(*clients.fresh(|_| false).unwrap(), 0, "one that works stays");
        assert_eq!(*clients.fresh(|client| *client == 0).unwrap(), 1);
        assert_eq!((*clients.get(), *clients.fresh(|client| *client == 0).unwrap()), (1, 1));
        assert_eq!(*clients.fresh(|_| true).unwrap(), 1, "what spends each at once is not fed");
    }

    #[test]
    fn where_none_can_be_made_the_spent_one_stays_and_the_next_call_tries_again() {
        let calls = AtomicU32::new(0);
        let make = move || match calls.fetch_add(1, Ordering::Relaxed) {
            1 => Err(KafkaError::Canceled),
            call => Ok(call),
        };
        let clients = Lasting::new(make).unwrap();
        assert!(clients.fresh(|_| true).is_err());
        assert_eq!(*clients.get(), 0);
        assert_eq!(*clients.fresh(|_| true).unwrap(), 2);
    }
}
