"""A network connection that a test can cut."""

import socket
import threading
from contextlib import suppress


class Line:
    """Passes connections on to a port, until it is cut: all that are open end, new ones are taken again."""

    def __init__(self, port):
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open = []
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self):
        """End every connection; returns how many there were."""
        pairs, self._open = self._open, []
        for end in (end for pair in pairs for end in pair):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def cut_every(self, seconds, cuts):
        """Cut again and again while the line is in use, and note in `cuts` how many connections; returns what ends it."""
        over = threading.Event()

        def run():
            while not over.wait(seconds):
                if number := self.cut():
                    cuts.append(number)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()

        def stop():
            over.set()
            thread.join()

        return stop

    def close(self):
        self._listener.close()
        self.cut()

    def _accept(self):
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(self._to)
                self._open.append((here, there))
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source, sink):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
