"""A bad cable: carries packets between two network interfaces, late, and not all of them.

    python cable.py PORT OTHER DELAY_SECONDS LOSS_SHARE BYTES_PER_SECOND

What comes in at PORT leaves at BYTES_PER_SECOND, the other direction is as fast as it comes; 0: as fast as it comes.
Runs until it is killed. Packets keep their virtio header, so segments that the sender left to "hardware" (checksums,
splitting into frames) stay as they were.
"""

import contextlib
import heapq
import random
import select
import socket
import sys
import time

SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23  # linux/if_packet.h
ETH_P_ALL, SO_RCVBUFFORCE = 3, 33
WAITING = 2**26  # bytes that may wait to be read here: more would be lost, and TCP would slow down for seconds
LARGEST = 10 + 14 + 65535  # bytes: virtio header, Ethernet header, the largest segment


def plug(interface: str) -> socket.socket:
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)  # no protocol yet: hears nothing
    wire.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    wire.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING)
    wire.bind((interface, ETH_P_ALL))
    wire.setblocking(False)
    return wire


def main(port: str, other: str, delay: float, loss: float, rate: float) -> None:
    ends = plug(port), plug(other)
    chance = random.Random(0)
    on_the_way: list[tuple[float, int, int, bytes]] = []  # due time, number, the end it leaves by, packet
    number, free = 0, 0.0
    print("plugged in", flush=True)
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        readable, _, _ = select.select(ends, [], [], wait)
        for end in readable:
            packet = end.recv(LARGEST)
            if chance.random() >= loss:
                number += 1
                leaves = time.monotonic()
                if rate and end is ends[0]:
                    leaves = free = max(leaves, free) + len(packet) / rate
                heapq.heappush(on_the_way, (leaves + delay, number, 1 - ends.index(end), packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, _, leaving, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # the interface is down: lost, as on a real cable
                ends[leaving].send(packet)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6]))
