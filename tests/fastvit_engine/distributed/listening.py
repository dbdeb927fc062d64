"""Which addresses a process listens on, as Linux tells."""

import ipaddress
import os
import re
import sys
from pathlib import Path


def listening_addresses(process: int) -> list[str]:
    """The addresses of the TCP sockets that a process listens on, each as often as it does."""
    links = (os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir() if entry.is_symlink())
    inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in inodes:
                words = re.findall("........", local.partition(":")[0])
                number = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
                found.append(str(ipaddress.ip_address(number)))
    return found


def is_reachable_from_elsewhere(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    mapped = getattr(ip, "ipv4_mapped", None)
    return not (mapped or ip).is_loopback
