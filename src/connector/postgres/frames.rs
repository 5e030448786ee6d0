//! The rows of a COPY, on a way of their own around the library that takes messages apart.
//!
//! A server sends every row as a message of its own, and a library frames each, counts who holds it and hands it over: more work than decoding what is
//! in it. A [`Diverted`] connection lies between the socket, or what decrypts it, and the library; it takes the rows out and sends them to who reads the
//! COPY, many together, in [`Blocks`], where they lie as they came. Their order stays the server's, and their messages whole; other messages pass
//! as they are; nothing that is complete is held back while nothing more comes. Who does not read in time holds up the server, and who has gone away
//! leaves the rest to the library. Not done: connections by a socket in a folder, which the library opens without asking anybody.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
    task::{self, Context, Poll},
};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{FutureExt, StreamExt, TryFutureExt, channel::mpsc, future::BoxFuture};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_util::{io::poll_read_buf, sync::PollSemaphore};

/// Bytes that are asked of the socket at a time.
const INPUT_BYTES: usize = 64 << 10;
/// Bytes of rows that are sent together, though more came. A longer row goes with at most so many before it.
const BLOCK_BYTES: usize = 32 << 10;
/// Bytes of blocks that wait for who reads them. A longer one waits alone.
const WAITING_BYTES: u32 = 256 << 10;
/// A message's tag and its length, which counts itself and not the tag.
pub(super) const HEAD: usize = 5;
/// The tags of a row, of what comes before all rows of a COPY, and of what ends it.
const ROW: u8 = b'd';
const BEGIN: u8 = b'H';
const ENDS: [u8; 3] = [b'c', b'E', b'Z'];
/// The tag of who is at the other end: the number of its process, and a secret.
const KEY: u8 = b'K';

/// Rows as the server sent them: whole messages, each behind its head.
#[derive(Debug)]
pub(super) struct Block {
    pub(super) messages: Bytes,
    /// How many they are.
    count: usize,
}

impl Block {
    /// Bytes of the rows, without the heads.
    pub(super) fn row_bytes(&self) -> usize {
        self.messages.len() - HEAD * self.count
    }
}

/// What messages hold, one behind the other.
pub(super) fn without_heads(mut messages: &[u8]) -> Vec<u8> {
    let mut rows = Vec::with_capacity(messages.len());
    while let Some((_, length)) = head(messages) {
        let (message, rest) = messages.split_at_checked(length).unwrap_or((messages, &[]));
        rows.extend_from_slice(message.get(HEAD..).unwrap_or_default());
        messages = rest;
    }
    rows
}

/// The rows of one COPY.
#[derive(Debug)]
pub(super) struct Blocks(mpsc::UnboundedReceiver<(Block, OwnedSemaphorePermit)>);

impl Blocks {
    /// The next ones; `None` behind the last.
    pub(super) async fn next(&mut self) -> Option<Block> {
        self.0.next().await.map(|(block, _)| block)
    }
}

/// Where blocks are sent.
#[derive(Debug)]
struct Rows {
    blocks: mpsc::UnboundedSender<(Block, OwnedSemaphorePermit)>,
    room: PollSemaphore,
}

/// Where the rows of a connection's next COPY go, and who is at its other end.
#[derive(Debug, Clone, Default)]
pub(super) struct Next {
    rows: Arc<Mutex<Option<Rows>>>,
    process: Arc<AtomicI32>,
}

impl Next {
    /// The rows of the COPY that is asked for now. There is one at a time: before another one is asked for, this one has been read to its end.
    pub(super) fn blocks(&self) -> Blocks {
        let (sender, blocks) = mpsc::unbounded();
        let room = PollSemaphore::new(Arc::new(Semaphore::new(WAITING_BYTES as usize)));
        self.set(Some(Rows { blocks: sender, room }));
        Blocks(blocks)
    }

    /// The number of the process that is at the other end, as that said when the connection was opened: a server's own, or one that a pooler made up.
    pub(super) fn process(&self) -> i32 {
        self.process.load(Ordering::Relaxed)
    }

    fn set(&self, rows: Option<Rows>) -> Option<Rows> {
        std::mem::replace(&mut *self.rows.lock().unwrap_or_else(PoisonError::into_inner), rows)
    }
}

/// Opens diverted connections by `T`.
#[derive(Debug)]
pub(super) struct Diverting<T>(pub(super) T, pub(super) Next);

/// Opens diverted connections without TLS: for a [`tokio_postgres::Config`] that requires it and does not negotiate, which hands over the socket as it is.
#[derive(Debug, Clone)]
pub(super) struct Plain(pub(super) Next);

/// A connection whose rows go their own way.
pub(super) struct Diverted<S> {
    stream: S,
    binding: fn(&S) -> ChannelBinding,
    next: Next,
    /// What has come and was not handed on yet: first the rows that go together.
    input: BytesMut,
    /// How many bytes they have, and how many they are.
    ready: usize,
    count: usize,
    /// How many more bytes of a message pass as they are.
    passing: usize,
    /// Who reads the COPY under way.
    rows: Option<Rows>,
}

/// What has to happen first, before more is handed on.
enum Wants {
    /// More has to come, or to be asked for.
    More,
    /// The block has to go.
    Sending,
}

impl<S> Diverted<S> {
    fn new(stream: S, binding: fn(&S) -> ChannelBinding, next: Next) -> Self {
        Self { stream, binding, next, input: BytesMut::new(), ready: 0, count: 0, passing: 0, rows: None }
    }

    /// Hands on what is complete and has room.
    fn hand_on(&mut self, out: &mut ReadBuf<'_>) -> Wants {
        loop {
            if self.passing > 0 {
                let some = self.passing.min(out.remaining()).min(self.input.len());
                out.put_slice(&self.input.split_to(some));
                self.passing -= some;
                if self.passing > 0 {
                    return Wants::More;
                }
            }
            let waiting = self.input.get(self.ready..).unwrap_or_default();
            let Some((tag, length)) = head(waiting) else { return Wants::More };
            let is_row = tag == ROW && self.rows.is_some();
            if (is_row || tag == KEY && length <= INPUT_BYTES) && waiting.len() < length {
                return Wants::More;
            }
            // Rows go before what comes behind them.
            if self.ready > 0 && !is_row || self.ready >= BLOCK_BYTES {
                return Wants::Sending;
            }
            if is_row {
                self.ready += length;
                self.count += 1;
                continue;
            }
            match tag {
                BEGIN => self.rows = self.next.set(None),
                KEY => {
                    if let Some(process) = waiting.get(HEAD..length).and_then(<[u8]>::first_chunk) {
                        self.next.process.store(i32::from_be_bytes(*process), Ordering::Relaxed);
                    }
                }
                tag if ENDS.contains(&tag) => self.rows = None,
                _ => {}
            }
            self.passing = length;
        }
    }

    /// Sends the rows that go together, as soon as there is room for them.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut room = None;
        if let Some(rows) = &mut self.rows {
            let bytes = u32::try_from(self.ready).unwrap_or(u32::MAX).min(WAITING_BYTES);
            room = task::ready!(rows.room.poll_acquire_many(cx, bytes));
        }
        let messages = self.input.split_to(std::mem::take(&mut self.ready)).freeze();
        if messages.len() > 2 * INPUT_BYTES {
            // The memory that a long row needed goes with it.
            self.input = BytesMut::from(self.input.as_ref());
        }
        let block = Block { messages, count: std::mem::take(&mut self.count) };
        let sent = self.rows.as_ref().zip(room).map(|(rows, room)| rows.blocks.unbounded_send((block, room)));
        if !matches!(sent, Some(Ok(()))) {
            // Nobody reads them any more.
            self.rows = None;
        }
        Poll::Ready(())
    }
}

/// The tag of a message and its bytes, with both; `None` if too little of it has come. What has a length that cannot be is no row: the library
/// is to see it as it is.
pub(super) fn head(bytes: &[u8]) -> Option<(u8, usize)> {
    let ([tag, length @ ..], _) = bytes.split_first_chunk::<HEAD>()?;
    match usize::try_from(i32::from_be_bytes(*length)) {
        Ok(length) if length >= HEAD - 1 => Some((*tag, 1 + length)),
        _ => Some((0, HEAD)),
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Diverted<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        loop {
            let wants = this.hand_on(out);
            if out.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            if matches!(wants, Wants::Sending) {
                task::ready!(this.poll_send(cx));
                continue;
            }
            if this.input.capacity() - this.input.len() < INPUT_BYTES / 4 {
                // What goes now is not copied; what has come of the next row is.
                if this.ready > 0 {
                    task::ready!(this.poll_send(cx));
                    continue;
                }
                this.input.reserve(INPUT_BYTES);
            }
            match poll_read_buf(Pin::new(&mut this.stream), cx, &mut (&mut this.input).limit(INPUT_BYTES)) {
                Poll::Ready(came) => {
                    if came? == 0 {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Pending => {
                    if this.ready > 0 {
                        // Sent or not: who wakes us is known.
                        task::ready!(this.poll_send(cx));
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Diverted<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Diverted<S> {
    fn channel_binding(&self) -> ChannelBinding {
        (self.binding)(&self.stream)
    }
}

impl<S, T> MakeTlsConnect<S> for Diverting<T>
where
    T: MakeTlsConnect<S>,
    Diverting<T::TlsConnect>: TlsConnect<S, Stream = Diverted<T::Stream>>,
{
    type Error = T::Error;
    type Stream = Diverted<T::Stream>;
    type TlsConnect = Diverting<T::TlsConnect>;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self::TlsConnect, T::Error> {
        Ok(Diverting(self.0.make_tls_connect(domain)?, self.1.clone()))
    }
}

impl<S, T> TlsConnect<S> for Diverting<T>
where
    T: TlsConnect<S, Future: Send + 'static>,
{
    type Error = T::Error;
    type Future = BoxFuture<'static, Result<Self::Stream, T::Error>>;
    type Stream = Diverted<T::Stream>;

    fn connect(self, stream: S) -> Self::Future {
        let Self(tls, next) = self;
        tls.connect(stream).map_ok(|stream| Diverted::new(stream, TlsStream::channel_binding, next)).boxed()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> MakeTlsConnect<S> for Plain {
    type Error = Infallible;
    type Stream = Diverted<S>;
    type TlsConnect = Self;

    fn make_tls_connect(&mut self, _: &str) -> Result<Self, Infallible> {
        Ok(self.clone())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsConnect<S> for Plain {
    type Error = Infallible;
    type Future = Ready<Result<Diverted<S>, Infallible>>;
    type Stream = Diverted<S>;

    fn connect(self, stream: S) -> Self::Future {
        ready(Ok(Diverted::new(stream, |_| ChannelBinding::none(), self.0)))
    }
}

#[cfg(test)]
mod unit {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    /// What comes from a server, as it comes: nothing where a piece is empty.
    struct Pieces(VecDeque<Vec<u8>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            out: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Some(mut piece) = self.0.pop_front() else { return Poll::Ready(Ok(())) };
            if piece.is_empty() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let rest = piece.split_off(piece.len().min(out.remaining()));
            out.put_slice(&piece);
            if !rest.is_empty() {
                self.0.push_front(rest);
            }
            Poll::Ready(Ok(()))
        }
    }

    /// The messages in `bytes`: tags, and what they hold.
    fn messages(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
        let mut found = Vec::new();
        while let Some((tag, length)) = head(bytes) {
            let (message, rest) = bytes.split_at(length);
            found.push((tag, &message[HEAD..]));
            bytes = rest;
        }
        assert!(bytes.is_empty(), "half a message");
        found
    }

    /// A message of `length` bytes, other ones at each place.
    fn message(at: usize, tag: u8, length: usize) -> Vec<u8> {
        let held = (0..length).map(|byte| u8::try_from((byte + at) % 251).unwrap());
        let length = u32::try_from(length + 4).unwrap();
        [tag].into_iter().chain(length.to_be_bytes()).chain(held).collect()
    }

    /// What the library gets of `bytes`, with so much room at a time; and the blocks' rows, of which so many are read before their reader goes away.
    fn read(pieces: VecDeque<Vec<u8>>, rooms: &[usize], read: usize) -> (Vec<u8>, Vec<Vec<u8>>) {
        let next = Next::default();
        let mut blocks = next.blocks();
        let reader = async move {
            let mut all = Vec::new();
            while all.len() < read
                && let Some(block) = blocks.next().await
            {
                let rows = without_heads(&block.messages);
                assert_eq!(rows.len(), block.row_bytes());
                assert!(messages(&block.messages).iter().all(|(tag, _)| *tag == ROW));
                all.push(rows);
            }
            all
        };
        let mut diverted = Diverted::new(Pieces(pieces), |_| ChannelBinding::none(), next);
        let library = async move {
            let mut got = Vec::new();
            for room in rooms.iter().cycle() {
                let mut some = vec![0; *room];
                let count = diverted.read(&mut some).await.unwrap();
                if count == 0 {
                    break;
                }
                got.extend(&some[..count]);
            }
            got
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { tokio::join!(library, reader) })
    }

    proptest! {
        /// However it comes and however little room there is: the rows of the COPY that is read are in the blocks, whole and in their order, and every
        /// other message, also rows of another COPY, is as it was sent. Who stops reading gets no other rows and holds up nothing.
        #[test]
        fn rows_go_their_way_and_nothing_else_does(
            before in prop::collection::vec(prop::sample::select(b"RSKZCN".to_vec()), 0..5),
            copied in prop::collection::vec((prop::sample::select(b"ddddddddddddN".to_vec()), 0..900_usize), 0..300),
            long in prop::option::of((0..300_usize, 1000..200_000_usize)),
            end in prop::sample::select(b"cEZ".to_vec()),
            after in prop::collection::vec(prop::sample::select(b"CZHdc".to_vec()), 0..8),
            pieces in prop::collection::vec(prop_oneof![5 => 1..70_000_usize, 1 => Just(0)], 1..20),
            rooms in prop::collection::vec(1..20_000_usize, 1..20),
            stops in prop::option::of(0..4_usize),
        ) {
            let mut sent = Vec::new();
            sent.extend(before.iter().map(|tag| (*tag, 9)));
            sent.push((BEGIN, 3));
            sent.extend(copied.iter().enumerate().map(|(at, (tag, length))| {
                (*tag, long.filter(|long| long.0 == at).map_or(*length, |long| long.1))
            }));
            sent.push((end, 4));
            sent.extend(after.iter().map(|tag| (*tag, 11)));
            let sent: Vec<Vec<u8>> =
                sent.iter().enumerate().map(|(at, (tag, length))| message(at, *tag, *length)).collect();
            let bytes = sent.concat();
            let (mut rest, mut server) = (&bytes[..], VecDeque::new());
            for piece in pieces.iter().chain([&1]).cycle() {
                if rest.is_empty() { break }
                let (piece, more) = rest.split_at(rest.len().min(*piece));
                server.push_back(piece.to_vec());
                rest = more;
            }
            let (library, blocks) = read(server, &rooms, stops.unwrap_or(usize::MAX));
            let of_copy = before.len() + 1..before.len() + 1 + copied.len();
            let is_row = |at: &usize| of_copy.contains(at) && sent[*at][0] == ROW;
            let rows: Vec<&[u8]> = (0..sent.len()).filter(is_row).map(|at| &sent[at][HEAD..]).collect();
            let others: Vec<u8> = (0..sent.len()).filter(|at| !is_row(at)).flat_map(|at| sent[at].clone()).collect();
            let ends: Vec<usize> = rows.iter().scan(0, |end, row| { *end += row.len(); Some(*end) }).collect();
            let rows = rows.concat();
            let mut taken = 0;
            for block in &blocks {
                prop_assert!(rows[taken..].starts_with(block));
                taken += block.len();
                prop_assert!(taken == 0 || ends.contains(&taken), "a row is torn");
            }
            if stops.is_none() {
                prop_assert_eq!(taken, rows.len());
                prop_assert!(library == others);
            } else {
                // What nobody reads any more goes through the library, which lets it fall.
                let held = |bytes: &[u8]| messages(bytes).iter().filter(|(tag, _)| *tag != ROW).map(|(tag, held)| (*tag, held.to_vec())).collect::<Vec<_>>();
                prop_assert_eq!(held(&library), held(&others));
            }
        }
    }

    #[test]
    fn rows_that_came_together_are_one_block() {
        let row = |value: u8| [&[ROW, 0, 0, 0, 5][..], &[value]].concat();
        let (begin, end) = ([BEGIN, 0, 0, 0, 4], [b'c', 0, 0, 0, 4]);
        let sent = [&begin[..], &row(1), &row(2), &end, &row(3)].concat();
        let (library, blocks) = read([sent].into(), &[100], usize::MAX);
        assert_eq!(blocks, [[1, 2]]);
        assert_eq!(library, [&begin[..], &end, &row(3)].concat());
    }

    #[test]
    fn the_memory_of_a_long_row_goes_with_it() {
        let next = Next::default();
        let mut blocks = next.blocks();
        let sent = [vec![BEGIN, 0, 0, 0, 4], message(0, ROW, 3 << 20), message(1, b'c', 4)].concat();
        let mut diverted = Diverted::new(Pieces([sent].into()), |_| ChannelBinding::none(), next);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            while diverted.read(&mut [0; 100]).await.unwrap() > 0 {}
            assert_eq!(blocks.next().await.unwrap().row_bytes(), 3 << 20);
        });
        // Now that nobody holds the block, its memory would be had again.
        diverted.input.reserve(1);
        assert!(diverted.input.capacity() <= 4 * INPUT_BYTES, "{}", diverted.input.capacity());
    }

    #[test]
    fn what_is_complete_is_not_held_back() {
        let row = |value: u8| [&[ROW, 0, 0, 0, 5][..], &[value]].concat();
        let begun = [&[BEGIN, 0, 0, 0, 4][..], &row(1), &row(2)[..5]].concat();
        let (library, blocks) = read([begun, Vec::new(), vec![2]].into(), &[100], usize::MAX);
        assert_eq!((library, blocks), (vec![BEGIN, 0, 0, 0, 4], vec![vec![1]]));
    }

    #[test]
    fn a_length_that_cannot_be_is_left_to_the_library() {
        for length in [0, 3, -1, i32::MIN] {
            let begin = [BEGIN, 0, 0, 0, 4];
            let torn =
                [&begin[..], &[ROW], &i32::to_be_bytes(length), b"rest of what is no message"].concat();
            let (library, blocks) = read([torn.clone()].into(), &[10], usize::MAX);
            assert!(library.starts_with(&torn[..10]), "{library:?}");
            assert_eq!(blocks, Vec::<Vec<u8>>::new());
        }
    }
}
