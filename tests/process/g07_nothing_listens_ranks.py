"""What the ranks of these tests run: apart, so that no rank imports pytest for it."""

from __future__ import annotations

import os

INTERNET = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6")


class Sockets:
    """Of every socket of this network namespace that has an address: its inode, and what it is."""

    def __init__(self):
        self.internet = {}
        self.unix = {}
        for kind in INTERNET:
            for fields in rows(f"/proc/net/{kind}"):
                # 0A is TCP_LISTEN. A UDP socket listens as soon as it has a port.
                self.internet[fields[9]] = f"{kind} {fields[1]} state {fields[3]}"
        for fields in rows("/proc/net/unix"):
            listens = int(fields[3], 16) & 0x10000  # SO_ACCEPTCON
            path = fields[7] if len(fields) > 7 else ""
            if listens or path:  # "@..." is a name too, in the abstract namespace
                self.unix[fields[6]] = f"unix {path!r} flags {fields[3]}"


def rows(path):
    try:
        with open(path) as file:
            return [line.split() for line in file.readlines()[1:]]
    except FileNotFoundError:
        return []  # a kernel without it


class Opener:
    def run(self, code):
        exec(code, self.__dict__)

    def let_go(self):
        os.close(self.it) if isinstance(self.it, int) else self.it.close()
