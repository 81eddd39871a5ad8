"""What can go wrong on the wire. A small tree, so that callers map it to HTTP and to metrics in one place."""


class TransportError(Exception):
    """Any failure of the transport."""


class ProtocolError(TransportError):
    """Bytes from a peer that are not what the protocol says; the frame or message is dropped."""


class Overloaded(TransportError):
    """A bounded queue is full: the peer does not take what it is sent. Try later or treat the peer as suspect."""
