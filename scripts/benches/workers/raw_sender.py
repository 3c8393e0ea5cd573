"""Sends bytes over a plain socket as fast as possible, as the baseline for tcp.

Prints its port. A request is two eight-byte numbers: offset and length. The answer is the bytes in this range.
"""

import socket
import sys

LONGEST_BYTES = 256 << 20


def main() -> None:
    data = memoryview(bytes(range(256)) * (LONGEST_BYTES // 256))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        peer, _ = server.accept()
    with peer:
        while asked := peer.recv(16, socket.MSG_WAITALL):
            start, length = int.from_bytes(asked[:8], "big"), int.from_bytes(asked[8:], "big")
            peer.sendall(data[start : start + length])


if __name__ == "__main__":
    sys.exit(main())
