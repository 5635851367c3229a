"""A web server that lets every request wait, and otherwise costs as little as can be: the file goes out by sendfile(2).

usage: serve.py DIRECTORY DELAY_S    prints its port; ends when its standard input does
"""

import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as every web server does: the head and the body of an answer are two writes

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        time.sleep(self.server.delay_s)
        try:
            fd = os.open(self.server.root + self.path, os.O_RDONLY)
        except OSError:
            self.send_error(404)
            return
        try:
            size = os.fstat(fd).st_size
            start, end = 0, size
            wanted = re.fullmatch(r"bytes=([0-9]*)-([0-9]*)", self.headers.get("Range", ""))
            if wanted and wanted[1]:
                start, end = int(wanted[1]), min(int(wanted[2] or size) + 1, size)
            elif wanted:
                start = max(size - int(wanted[2]), 0)
            self.send_response_only(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            while start < end:
                start += os.sendfile(self.connection.fileno(), fd, start, end - start)
        except ConnectionError:
            self.close_connection = True  # a client that ends
        finally:
            os.close(fd)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.root, server.delay_s = os.path.abspath(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
