"""A TCP proxy that makes a Redis slow, or cuts its connections."""

from __future__ import annotations

import socket
import threading
import time


class Proxy:
    """Listens on a port of its own and passes everything on, `delay_s` later in each direction."""

    def __init__(self, port: int, delay_s: float = 0.0) -> None:
        self.target, self.delay_s = port, delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> int:
        """Break all connections; returns their number."""
        broken = list(self._open)
        for one in broken:
            _shut(one)
        return len(broken) // 2

    def close(self) -> None:
        _shut(self._listener)
        self.cut()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=[client], daemon=True).start()
        except OSError:
            self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        self._open |= {client, server}
        back = threading.Thread(target=self._pass_on, args=[server, client], daemon=True)
        back.start()
        self._pass_on(client, server)
        back.join()
        for one in (client, server):
            one.close()
            self._open.discard(one)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while block := source.recv(1 << 16):
                time.sleep(self.delay_s)
                sink.sendall(block)
        except OSError:
            pass
        _shut(sink)


def _shut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
