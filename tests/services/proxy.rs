//! A proxy that stands before a server and does what networks do, at a chosen message: it cuts, tears, resets and loses.
//!
//! Before PostgreSQL, without TLS, it knows where messages begin and what they ask. Before any other server every byte is a message.

use std::{
    borrow::Cow,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Where a fault strikes. Messages are counted from 1, over all connections.
#[derive(Debug, Clone, Copy)]
pub enum At {
    /// The nth message of clients.
    Client(usize),
    /// The nth message of the server.
    Server(usize),
    /// A client's message with such a text: the SQL of a query or of a statement to prepare; the head of an HTTP request.
    Question(fn(&str) -> bool),
    /// The first message that the server answers to it.
    Answer(fn(&str) -> bool),
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Both sides are closed before the message.
    Cut,
    /// Both sides are closed in the middle of the message.
    Tear,
    /// Both sides are closed before the message, and the client learns it by a reset.
    Reset,
    /// The client's side is closed; the server gets the message, and its side stays until it has answered.
    Lose,
    /// As `Lose`, and before the message comes to it the server's process stands still, until [`Proxy::go_on`].
    Freeze,
    /// All other connections are closed, and what the server does for them has ended, before the message passes.
    CutOthers,
}

/// A proxy on the loopback. Connections that it still has end with it.
#[derive(Debug)]
pub struct Proxy {
    /// Its port.
    pub port: u16,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Before the PostgreSQL server at this port of the loopback.
    pub fn postgres(server: u16) -> Self {
        Self::new(server, Framing::Postgres, false)
    }

    /// Before the PostgreSQL server at this port; what it copies out comes in other messages than it sent, cut within rows and values, but for the first of
    /// them ([`WHOLE_BYTES`]).
    pub fn recutting(server: u16) -> Self {
        Self::new(server, Framing::Postgres, true)
    }

    /// Before any server at this port of the loopback.
    pub fn bytes(server: u16) -> Self {
        Self::new(server, Framing::Bytes, false)
    }

    fn new(server: u16, framing: Framing, recuts: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            framing,
            recuts,
            order: Mutex::default(),
            connections: Mutex::default(),
            frozen: Mutex::default(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                // A server that does not answer closes the client's side too.
                if let (Ok(client), Ok(server)) = (client, TcpStream::connect(("127.0.0.1", server))) {
                    Shared::serve(&serving, client, server);
                }
            }
        });
        Self { port, shared }
    }

    /// From now on everything passes, and is counted from nothing.
    pub fn pass(&self) {
        *held(&self.shared.order) = Arc::default();
    }

    /// The next connections are counted from nothing, and the fault strikes once.
    pub fn strike(&self, at: At, fault: Fault) {
        self.order(Order { what: Some((at, fault)), ..Order::default() });
    }

    /// The same, and it strikes again and again; of counted messages, at each one from there on.
    pub fn strike_for_ever(&self, at: At, fault: Fault) {
        self.order(Order { what: Some((at, fault)), for_ever: true, ..Order::default() });
    }

    fn order(&self, order: Order) {
        *held(&self.shared.order) = Arc::new(order);
    }

    /// How many messages came since then: of clients, and of the server.
    pub fn messages(&self) -> (usize, usize) {
        let order = Arc::clone(&held(&self.shared.order));
        let done = held(&order.done);
        (done.client, done.server)
    }

    /// How often the fault struck.
    pub fn struck(&self) -> usize {
        let order = Arc::clone(&held(&self.shared.order));
        let done = held(&order.done);
        done.struck
    }

    /// The server's process that stands still.
    pub fn frozen(&self) -> Option<i32> {
        *held(&self.shared.frozen)
    }

    /// Wakes it up.
    pub fn go_on(&self) {
        if let Some(process) = held(&self.shared.frozen).take() {
            let _ended_already = kill(Pid::from_raw(process), Signal::SIGCONT);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // A process that nobody wakes up would hold its locks against all other tests.
        self.go_on();
        let open: Vec<_> = held(&self.shared.connections).iter().filter_map(Weak::upgrade).collect();
        for connection in &open {
            connection.close();
        }
    }
}

/// A lock, also where a thread that held it has panicked.
fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was ordered, and what has come of it.
#[derive(Debug, Default)]
struct Order {
    what: Option<(At, Fault)>,
    for_ever: bool,
    done: Mutex<Done>,
}

#[derive(Debug, Default)]
struct Done {
    client: usize,
    server: usize,
    struck: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// One client, and the server's side of it. The sockets close when both of its threads have ended.
#[derive(Debug)]
struct Connection {
    client: TcpStream,
    server: TcpStream,
    /// What was ordered when it was opened.
    order: Arc<Order>,
    /// The server's process that serves it, once the server has told.
    process: OnceLock<i32>,
    /// Whether the server's next message answers the question that is meant.
    asked: AtomicBool,
    /// How many of the client's questions the server has still to answer.
    unanswered: AtomicUsize,
    /// Whether the client's side was closed for good.
    lost: AtomicBool,
    /// Whether the client's side ends without a farewell.
    reset: AtomicBool,
}

impl Connection {
    /// Closes both sides.
    fn close(&self) {
        // A reset comes of the last close, if nothing announced the end before: reading ends, and wakes who reads.
        let how = if self.reset.load(SeqCst) { Shutdown::Read } else { Shutdown::Both };
        drop(self.client.shutdown(how));
        drop(self.server.shutdown(Shutdown::Both));
    }

    /// Closes both sides, so that the client's is reset.
    fn reset(&self) {
        // The option belongs to the socket, whose copy this is; the standard library does not set it yet.
        let copy = tokio::net::TcpSocket::from_std_stream(self.client.try_clone().unwrap());
        copy.set_zero_linger().unwrap();
        self.reset.store(true, SeqCst);
        self.close();
    }

    /// Closes the client's side. The server hears nothing of it.
    fn lose(&self) {
        self.lost.store(true, SeqCst);
        drop(self.client.shutdown(Shutdown::Both));
    }
}

/// Where messages begin and end.
#[derive(Debug, Clone, Copy)]
enum Framing {
    /// A type in one byte, then the length of what follows, itself included. What a client says first has no type.
    Postgres,
    /// Each byte is a message.
    Bytes,
}

impl Framing {
    /// The next message of one side, or its next bytes; `None` if it says no more.
    fn next(self, mut from: &TcpStream, first: bool) -> Option<Vec<u8>> {
        match self {
            Self::Postgres => {
                let head = if first { 4 } else { 5 };
                let mut message = vec![0; head];
                from.read_exact(&mut message).ok()?;
                let length = u32::from_be_bytes(message[head - 4..].try_into().unwrap());
                let rest = usize::try_from(length).unwrap().checked_sub(4)?;
                message.resize(head + rest, 0);
                from.read_exact(&mut message[head..]).ok()?;
                Some(message)
            }
            Self::Bytes => {
                let mut bytes = vec![0; 16 << 10];
                let count = from.read(&mut bytes).ok().filter(|count| *count > 0)?;
                bytes.truncate(count);
                Some(bytes)
            }
        }
    }

    /// The text of a client's message.
    fn text(self, message: &[u8]) -> Cow<'_, str> {
        let texts = |bytes| <[u8]>::split(bytes, |byte| *byte == 0);
        let text = match (self, message) {
            (Self::Bytes, bytes) => Some(bytes),
            (Self::Postgres, [b'Q', _, _, _, _, texts_of @ ..]) => texts(texts_of).next(),
            // The name of the statement comes first.
            (Self::Postgres, [b'P', _, _, _, _, texts_of @ ..]) => texts(texts_of).nth(1),
            (Self::Postgres, _) => None,
        };
        String::from_utf8_lossy(text.unwrap_or_default())
    }

    /// The process that serves a connection, if the server tells it in this message.
    fn process(self, message: &[u8]) -> Option<i32> {
        match (self, message) {
            (Self::Postgres, [b'K', _, _, _, _, a, b, c, d, ..]) => {
                Some(i32::from_be_bytes([*a, *b, *c, *d]))
            }
            _ => None,
        }
    }

    /// Whether the server answers this message of a client's, with an end of its own: the first one, a query, a synchronisation.
    fn asks(self, message: &[u8], first: bool) -> bool {
        match self {
            Self::Postgres => first || message.starts_with(b"Q") || message.starts_with(b"S"),
            Self::Bytes => false,
        }
    }

    /// Whether this message ends an answer.
    fn ends_answer(self, message: &[u8]) -> bool {
        match self {
            Self::Postgres => message.starts_with(b"Z"),
            Self::Bytes => false,
        }
    }
}

/// So many bytes of what is copied out come as they were sent, before the rest is cut anew.
const WHOLE_BYTES: usize = 64 << 10;

/// Rows that are copied out, in other messages: first two in one, then all that is left in pieces.
fn recut(rows: &[Vec<u8>]) -> Vec<u8> {
    let (two, rest) = rows.split_at(rows.len().min(2));
    let (two, rest) = (two.concat(), rest.concat());
    let mut rest = rest.as_slice();
    let pieces = [1, 2, 3, 5, 70, 300, 31].into_iter().cycle().map_while(|length| {
        let (piece, later) = rest.split_at(rest.len().min(length));
        rest = later;
        (!piece.is_empty()).then_some(piece)
    });
    let mut messages = Vec::new();
    for piece in [two.as_slice()].into_iter().filter(|two| !two.is_empty()).chain(pieces) {
        messages.push(b'd');
        messages.extend(u32::try_from(piece.len() + 4).unwrap().to_be_bytes());
        messages.extend(piece);
    }
    messages
}

#[derive(Debug)]
struct Shared {
    framing: Framing,
    recuts: bool,
    order: Mutex<Arc<Order>>,
    connections: Mutex<Vec<Weak<Connection>>>,
    frozen: Mutex<Option<i32>>,
}

impl Shared {
    fn serve(this: &Arc<Self>, client: TcpStream, server: TcpStream) {
        // What is small goes out at once.
        for stream in [&client, &server] {
            drop(stream.set_nodelay(true));
        }
        let connection = Arc::new(Connection {
            client,
            server,
            order: Arc::clone(&held(&this.order)),
            process: OnceLock::new(),
            asked: AtomicBool::new(false),
            unanswered: AtomicUsize::new(0),
            lost: AtomicBool::new(false),
            reset: AtomicBool::new(false),
        });
        {
            let mut connections = held(&this.connections);
            connections.retain(|other| other.strong_count() > 0);
            connections.push(Arc::downgrade(&connection));
        }
        for side in [Side::Client, Side::Server] {
            let (this, connection) = (Arc::clone(this), Arc::clone(&connection));
            std::thread::spawn(move || this.pass_on(&connection, side));
        }
    }

    /// Passes on what one side says, until it says no more, or a fault ends the connection.
    fn pass_on(&self, connection: &Connection, side: Side) {
        let (from, mut to) = match side {
            Side::Client => (&connection.client, &connection.server),
            Side::Server => (&connection.server, &connection.client),
        };
        let mut first = side == Side::Client;
        let (mut whole, mut copied) = (0, Vec::new());
        while let Some(message) = self.framing.next(from, first) {
            if side == Side::Client && self.framing.asks(&message, first) {
                connection.unanswered.fetch_add(1, SeqCst);
            }
            first = false;
            if side == Side::Server
                && let Some(process) = self.framing.process(&message)
            {
                connection.process.get_or_init(|| process);
            }
            let (fault, passes) = match self.turn(connection, side, &message) {
                Some((fault, passes)) => (Some(fault), passes),
                None => (None, message.len()),
            };
            match fault {
                Some(Fault::Lose) => connection.lose(),
                Some(Fault::Freeze) => {
                    self.freeze(connection);
                    connection.lose();
                }
                Some(Fault::CutOthers) => self.cut_others(connection),
                Some(Fault::Cut | Fault::Tear | Fault::Reset) | None => {}
            }
            if self.recuts && side == Side::Server {
                match message.as_slice() {
                    [b'd', ..] if whole < WHOLE_BYTES => whole += message.len(),
                    [b'd', _, _, _, _, row @ ..] => {
                        copied.push(row.to_vec());
                        continue;
                    }
                    _ => {
                        drop(to.write_all(&recut(&std::mem::take(&mut copied))));
                        whole = 0;
                    }
                }
            }
            // Who has gone away does not want it; what the other side still says is read all the same.
            drop(to.write_all(&message[..passes]));
            match fault {
                Some(Fault::Cut | Fault::Tear) => return connection.close(),
                Some(Fault::Reset) => return connection.reset(),
                Some(Fault::Lose | Fault::Freeze | Fault::CutOthers) | None => {}
            }
            if side == Side::Server {
                // Clients do not wait for every answer before they ask again.
                let ended = usize::from(self.framing.ends_answer(&message));
                let left = connection.unanswered.fetch_sub(ended, SeqCst) - ended;
                if left == 0 && connection.lost.load(SeqCst) {
                    break;
                }
            }
        }
        match side {
            Side::Client if connection.lost.load(SeqCst) => {}
            Side::Client => drop(connection.server.shutdown(Shutdown::Write)),
            Side::Server => connection.close(),
        }
    }

    /// Counts a message. If it is the one that is meant: what happens, and how many of its bytes pass.
    fn turn(&self, connection: &Connection, side: Side, message: &[u8]) -> Option<(Fault, usize)> {
        let mut done = held(&connection.order.done);
        let count = match side {
            Side::Client => &mut done.client,
            Side::Server => &mut done.server,
        };
        let before = *count;
        *count += match self.framing {
            Framing::Postgres => 1,
            Framing::Bytes => message.len(),
        };
        let after = *count;
        let (at, fault) = connection.order.what?;
        let (due, before) = match (at, side) {
            (At::Client(nth), Side::Client) | (At::Server(nth), Side::Server) => {
                (nth <= after, nth.saturating_sub(before + 1))
            }
            (At::Question(is), Side::Client) => (is(&self.framing.text(message)), 0),
            (At::Answer(is), Side::Client) => {
                connection.asked.fetch_or(is(&self.framing.text(message)), SeqCst);
                (false, 0)
            }
            (At::Answer(_), Side::Server) => (connection.asked.swap(false, SeqCst), 0),
            (At::Client(_) | At::Question(_), Side::Server) | (At::Server(_), Side::Client) => (false, 0),
        };
        if !due || (done.struck > 0 && !connection.order.for_ever) {
            return None;
        }
        done.struck += 1;
        let passes = match fault {
            Fault::Cut | Fault::Reset => before,
            Fault::Tear => message.len() / 2,
            Fault::Lose | Fault::Freeze | Fault::CutOthers => message.len(),
        };
        Some((fault, passes))
    }

    /// Stops the process that serves a connection, and waits until it stands still.
    fn freeze(&self, connection: &Connection) {
        let process = *connection.process.get().unwrap();
        *held(&self.frozen) = Some(process);
        kill(Pid::from_raw(process), Signal::SIGSTOP).unwrap();
        while super::is_stopped(process.unsigned_abs()) == Some(false) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Closes all connections but one, and waits until the server has let go of them.
    fn cut_others(&self, this: &Connection) {
        let others: Vec<_> = held(&self.connections)
            .iter()
            .filter(|other| !std::ptr::eq(other.as_ptr(), this))
            .cloned()
            .collect();
        for other in others.iter().filter_map(Weak::upgrade) {
            drop(other.client.shutdown(Shutdown::Both));
            // It closes its own side last thing, when nothing of the session is left.
            drop(other.server.shutdown(Shutdown::Write));
        }
        while others.iter().any(|other| other.strong_count() > 0) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
