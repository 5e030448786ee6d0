//! The rows of a COPY, joined into larger messages before the library that takes them apart.
//!
//! A server sends every row as a message of its own, and a library frames each, counts who holds it and hands it over: more work than decoding what is
//! in it. A [`Joined`] connection lies between the socket, or what decrypts it, and the library, and makes one message of all rows that came and have
//! room. What they hold and their order stay the server's; rows stay whole where the server sent them whole; other messages pass as they are; nothing
//! that is complete is held back. Not done: connections by a socket in a folder, which the library opens without asking anybody.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    io,
    pin::Pin,
    task::{self, Context, Poll},
};

use futures::{TryFutureExt, future::MapOk};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};

/// Bytes that are asked of the socket at a time.
const INPUT_BYTES: usize = 64 << 10;
/// A message's tag and its length, which counts itself and not the tag.
const HEAD: usize = 5;
/// The tag of a row.
const ROW: u8 = b'd';

/// Opens joined connections by `T`.
#[derive(Debug)]
pub(super) struct Joining<T>(pub(super) T);

/// Opens joined connections without TLS: for a [`tokio_postgres::Config`] that requires it and does not negotiate, which hands over the socket as it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plain;

/// A connection whose rows are joined.
pub(super) struct Joined<S> {
    stream: S,
    binding: fn(&S) -> ChannelBinding,
    input: Box<[u8]>,
    /// Where what has come, and was not handed on yet, begins and ends.
    start: usize,
    end: usize,
    /// How many more bytes of a message pass as they are.
    passing: usize,
}

impl<S> Joined<S> {
    fn new(stream: S, binding: fn(&S) -> ChannelBinding) -> Self {
        Self { stream, binding, input: vec![0; INPUT_BYTES].into(), start: 0, end: 0, passing: 0 }
    }

    /// What has come and was not handed on.
    fn waiting(&self) -> &[u8] {
        self.input.get(self.start..self.end).unwrap_or_default()
    }

    /// Hands on what is complete and has room.
    fn hand_on(&mut self, out: &mut ReadBuf<'_>) {
        loop {
            if self.passing == 0 {
                if self.join(out) {
                    continue;
                }
                let waiting = self.waiting();
                let Some((tag, length)) = head(waiting) else { return };
                let comes_whole = tag == ROW && length <= INPUT_BYTES;
                if comes_whole && waiting.len() < length {
                    return;
                }
                self.passing = length;
            }
            let some = self.passing.min(out.remaining()).min(self.waiting().len());
            if some == 0 {
                return;
            }
            out.put_slice(self.waiting().get(..some).unwrap_or_default());
            self.start += some;
            self.passing -= some;
        }
    }

    /// Hands on all rows that have come and have room, as one message; false if there is none.
    fn join(&mut self, out: &mut ReadBuf<'_>) -> bool {
        let waiting = self.waiting();
        let (mut taken, mut bytes) = (0, HEAD);
        while let Some((ROW, length)) = waiting.get(taken..).and_then(head)
            && taken + length <= waiting.len()
            && bytes + length - HEAD <= out.remaining()
        {
            taken += length;
            bytes += length - HEAD;
        }
        let (Ok(length), Some(mut rows)) = (u32::try_from(bytes - 1), waiting.get(..taken)) else {
            return false;
        };
        if rows.is_empty() {
            return false;
        }
        out.put_slice(&[ROW]);
        out.put_slice(&length.to_be_bytes());
        while let Some((row, rest)) = head(rows).and_then(|(_, length)| rows.split_at_checked(length)) {
            out.put_slice(row.get(HEAD..).unwrap_or_default());
            rows = rest;
        }
        self.start += taken;
        true
    }
}

/// The tag of a message and its bytes, with both; `None` if too little of it has come. What has a length that cannot be is no row: the library
/// is to see it as it is.
fn head(bytes: &[u8]) -> Option<(u8, usize)> {
    let ([tag, length @ ..], _) = bytes.split_first_chunk::<HEAD>()?;
    match usize::try_from(i32::from_be_bytes(*length)) {
        Ok(length) if length >= HEAD - 1 => Some((*tag, 1 + length)),
        _ => Some((0, HEAD)),
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Joined<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = out.filled().len();
        loop {
            this.hand_on(out);
            if out.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            this.input.copy_within(this.start..this.end, 0);
            (this.start, this.end) = (0, this.end - this.start);
            let mut input = ReadBuf::new(this.input.get_mut(this.end..).unwrap_or_default());
            task::ready!(Pin::new(&mut this.stream).poll_read(cx, &mut input))?;
            let came = input.filled().len();
            if came == 0 {
                return Poll::Ready(Ok(()));
            }
            this.end += came;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Joined<S> {
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

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream for Joined<S> {
    fn channel_binding(&self) -> ChannelBinding {
        (self.binding)(&self.stream)
    }
}

impl<S, T: MakeTlsConnect<S>> MakeTlsConnect<S> for Joining<T> {
    type Error = T::Error;
    type Stream = Joined<T::Stream>;
    type TlsConnect = Joining<T::TlsConnect>;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self::TlsConnect, T::Error> {
        self.0.make_tls_connect(domain).map(Joining)
    }
}

impl<S, T: TlsConnect<S>> TlsConnect<S> for Joining<T> {
    type Error = T::Error;
    type Future = MapOk<T::Future, fn(T::Stream) -> Joined<T::Stream>>;
    type Stream = Joined<T::Stream>;

    fn connect(self, stream: S) -> Self::Future {
        self.0.connect(stream).map_ok(|stream| Joined::new(stream, TlsStream::channel_binding))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> MakeTlsConnect<S> for Plain {
    type Error = Infallible;
    type Stream = Joined<S>;
    type TlsConnect = Self;

    fn make_tls_connect(&mut self, _: &str) -> Result<Self, Infallible> {
        Ok(*self)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> TlsConnect<S> for Plain {
    type Error = Infallible;
    type Future = Ready<Result<Joined<S>, Infallible>>;
    type Stream = Joined<S>;

    fn connect(self, stream: S) -> Self::Future {
        ready(Ok(Joined::new(stream, |_| ChannelBinding::none())))
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

    proptest! {
        /// However it comes and however little room there is: the same messages in the same order, of which rows may be one, and each whole.
        #[test]
        fn rows_are_joined_and_nothing_else_changes(
            sent in prop::collection::vec((prop::sample::select(b"ddddddddZCSN".to_vec()), 0..200_usize), 0..300),
            long in prop::option::of((0..300_usize, 1000..200_000_usize)),
            pieces in prop::collection::vec(prop_oneof![5 => 1..70_000_usize, 1 => Just(0)], 1..20),
            rooms in prop::collection::vec(1..20_000_usize, 1..20),
        ) {
            let mut bytes = Vec::new();
            for (at, (tag, length)) in sent.iter().enumerate() {
                let length = long.filter(|long| long.0 == at).map_or(*length, |long| long.1);
                let length = length.max(usize::from(*tag == ROW));
                bytes.push(*tag);
                bytes.extend(u32::try_from(length + 4).unwrap().to_be_bytes());
                bytes.extend((0..length).map(|byte| u8::try_from((byte + at) % 251).unwrap()));
            }
            let (mut rest, mut server) = (&bytes[..], VecDeque::new());
            for piece in pieces.iter().chain([&1]).cycle() {
                if rest.is_empty() { break }
                let (piece, more) = rest.split_at(rest.len().min(*piece));
                server.push_back(piece.to_vec());
                rest = more;
            }
            let mut joined = Joined::new(Pieces(server), |_| ChannelBinding::none());
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let mut got = Vec::new();
            for room in rooms.iter().cycle() {
                let mut some = vec![0; *room];
                let count = runtime.block_on(joined.read(&mut some)).unwrap();
                if count == 0 { break }
                got.extend(&some[..count]);
            }
            let mut sent = messages(&bytes).into_iter();
            for (tag, mut held) in messages(&got) {
                loop {
                    let (of, row) = sent.next().unwrap();
                    prop_assert_eq!(of, tag);
                    prop_assert!(held.starts_with(row), "a row is torn, or another");
                    held = &held[row.len()..];
                    if held.is_empty() { break }
                    prop_assert_eq!(tag, ROW);
                }
            }
            prop_assert!(sent.next().is_none());
        }
    }

    #[test]
    fn rows_that_came_together_are_one_message() {
        let row = |value: u8| [&[ROW, 0, 0, 0, 5][..], &[value]].concat();
        let sent = [row(1), row(2), vec![b'c', 0, 0, 0, 4], row(3)].concat();
        let mut joined = Joined::new(Pieces([sent].into()), |_| ChannelBinding::none());
        let mut got = Vec::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(joined.read_to_end(&mut got)).unwrap();
        assert_eq!(got, [&[ROW, 0, 0, 0, 6, 1, 2, b'c', 0, 0, 0, 4][..], &row(3)].concat());
    }

    #[test]
    fn a_length_that_cannot_be_is_left_to_the_library() {
        for length in [0, 3, -1, i32::MIN] {
            let sent = [&[ROW][..], &i32::to_be_bytes(length), b"rest of what is no message"].concat();
            let mut joined = Joined::new(Pieces([sent.clone()].into()), |_| ChannelBinding::none());
            let mut got = [0; HEAD];
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(joined.read_exact(&mut got)).unwrap();
            assert_eq!(got, sent[..HEAD]);
        }
    }
}
