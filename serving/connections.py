"""What the connections of a server may hold together: how many they are, and the bytes that wait in them."""

from collections import deque
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import State

CLOSING_S = 2.0  # that a connection which is closed is given to hear why
FRAGMENT_BYTES = 256  # what a fragment of a message costs beside its content: empty ones may come without end


class Budget:
    """The number of connections, and the bytes of messages in all of them that nobody has taken yet.

    Where they become too many, those connections are closed whose waiting message was begun first, until the rest fits:
    who sends at a usual pace is never the one that has waited longest.

    Args:
        max_connections: open at a time.
        max_bytes: waiting or being answered in all together, up to what one read from a socket brings (256 KiB).
    """

    def __init__(self, max_connections: int, max_bytes: int):
        if max_connections < 1 or max_bytes < 1:
            raise ValueError(f"max_connections is {max_connections} and max_bytes {max_bytes}; both must be at least 1")
        self.max_connections, self.max_bytes = max_connections, max_bytes
        self.admitted: set[BoundedConnection] = set()
        self.holding: dict[BoundedConnection, None] = {}  # in the order in which what waits in them was begun

    @property
    def held(self) -> int:
        """Bytes held by all connections now."""
        return sum(connection.waiting + connection.taken for connection in self.holding)

    def connection(self, *arguments: Any, **options: Any) -> "BoundedConnection":
        """`create_connection` of `websockets.serve`."""
        return BoundedConnection(self, *arguments, **options)

    def make_room(self) -> None:
        """Closes connections while all hold too much."""
        excess = self.held - self.max_bytes
        for connection in [one for one in self.holding if one.waiting]:
            if excess <= 0:
                return
            excess -= connection.waiting
            connection.give_up(f"over {self.max_bytes:,} bytes wait in all connections; try again later")


class BoundedConnection(ServerConnection):
    """A connection that counts what it holds for its `Budget`: bytes `waiting`, and those `taken`, of the message that
    is being answered.
    """

    def __init__(self, budget: Budget, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.budget = budget
        self._unread = 0  # bytes that are no whole frame yet
        self._fragments = 0  # bytes of the frames that are no whole message yet
        self._messages: deque[int] = deque()  # bytes of each whole message
        self.taken = 0

    @property
    def waiting(self) -> int:
        return self._unread + self._fragments + sum(self._messages)

    def take(self) -> None:
        """The message that was received last is being worked on."""
        self.taken = self._messages.popleft() if self._messages else 0  # none where it was given up meanwhile

    def data_received(self, data: bytes) -> None:
        if not self.waiting:
            self.budget.holding.pop(self, None)
            self.budget.holding[self] = None
        self._unread += len(data)
        super().data_received(data)
        if self.protocol.state in (State.CLOSING, State.CLOSED):
            self._unread = 0  # thrown away
        self.budget.make_room()

    def process_event(self, event: Any) -> None:
        if not isinstance(event, Frame):
            self._unread = 0  # the handshake
        else:
            size = len(event.data)
            self._unread = max(0, self._unread - size - 6 - (0 if size < 126 else 2 if size < 65_536 else 8))
            if event.opcode in DATA_OPCODES:
                self._fragments += size + FRAGMENT_BYTES
                if event.fin:
                    self._messages.append(self._fragments)
                    self._fragments = 0
        super().process_event(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.budget.holding.pop(self, None)
        self.budget.admitted.discard(self)
        super().connection_lost(exc)

    def give_up(self, reason: str) -> None:
        """Closes the connection and throws away what waits in it."""
        self._forget()
        self.protocol.fail(CloseCode.TRY_AGAIN_LATER, reason)
        self.send_data()
        self.loop.call_later(CLOSING_S, self.transport.abort)

    def _forget(self) -> None:
        self._unread = self._fragments = 0
        self._messages.clear()
