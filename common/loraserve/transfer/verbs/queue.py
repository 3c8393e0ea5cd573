"""RDMA queue pairs and the completion queue that they share."""

import os
import secrets

from loraserve.errors import ConfigError
from loraserve.messages import QueueEnd
from loraserve.transfer.verbs.device import ETHERNET, RdmaDevice, opening, pyverbs_module, verbs_enums, verbs_errors

READS_IN_FLIGHT = 16
"""Maximum number of outstanding reads of a queue pair. The device queues further posted reads."""
MTUS = range(1, 6)
READS = range(1, 256)
TIMEOUT = 14
"""An unanswered request is repeated after 4.096 us * 2 ** TIMEOUT = 67 ms, up to RETRIES times."""
RETRIES = 3
FOR_EVER = 7
HOPS = 64
SHORTEST_WAIT = 12
EVENTS = "anon_inode:[infinibandevent]"


class Completions:
    """A completion queue. When ``descriptor`` is readable, call ``acknowledge``, then ``poll`` until it returns []."""

    def __init__(self, device: RdmaDevice, entries: int) -> None:
        try:
            self._open(device, entries)
        except verbs_errors() as error:
            raise ConfigError(
                f"RDMA device {device.port.device} has no room for {entries} completions: {error}; "
                "raise the limit of locked memory (ulimit -l unlimited) or take verbs out of transfer.transports"
            ) from error

    def _open(self, device: RdmaDevice, entries: int) -> None:
        cq = pyverbs_module("cq")
        with opening:
            # pyverbs does not expose the channel's descriptor.
            before = _event_descriptors()
            self._channel = cq.CompChannel(device.context)
            (self.descriptor,) = _event_descriptors() - before
        # get_cq_event holds the interpreter's lock, so it must not block if there is no event.
        os.set_blocking(self.descriptor, False)
        self.queue = cq.CQ(device.context, entries, None, self._channel, 0)
        self.queue.req_notify()

    def acknowledge(self) -> None:
        try:
            self._channel.get_cq_event(self.queue)
        except verbs_errors():
            # There was no event.
            return
        # Each event must be acknowledged, or closing the queue blocks.
        self.queue.ack_events(1)
        self.queue.req_notify()

    def poll(self, most: int) -> list[tuple[int, int]]:
        """Return (number, status) of up to ``most`` completed requests. Status 0 means success."""
        _, found = self.queue.poll(most)
        return [(one.wr_id, one.status) for one in found]

    def close(self) -> None:
        self.queue.close()
        self._channel.close()


class QueuePair:
    """One end of a connection. If ``served``, the peer reads through it; otherwise this process reads."""

    def __init__(self, device: RdmaDevice, completions: Completions, depth: int, served: bool) -> None:
        self._device = device
        self._served = served
        self._psn = secrets.randbits(24)
        qp = pyverbs_module("qp")
        self._pair = qp.QP(
            device.domain,
            qp.QPInitAttr(
                qp_type=verbs_enums().IBV_QPT_RC,
                scq=completions.queue,
                rcq=completions.queue,
                cap=qp.QPCap(max_send_wr=depth, max_recv_wr=1),
                sq_sig_all=1,
            ),
        )

    @property
    def end(self) -> QueueEnd:
        device = self._device
        return QueueEnd(
            number=self._pair.qp_num,
            first_packet=self._psn,
            gid=device.port.gid,
            lid=device.lid,
            mtu=device.mtu,
            link_layer=device.port.link_layer,
            reads=min(READS_IN_FLIGHT, device.reads_served if self._served else device.reads_asked),
        )

    def connect(self, peer: QueueEnd) -> None:
        """Connect to the peer's end. Raises one of verbs_errors(). Holds the interpreter's lock for milliseconds."""
        if not (peer.mtu in MTUS and peer.reads in READS):
            raise ValueError(f"mtu {peer.mtu}, {peer.reads} reads: the peer's end of the connection is invalid")
        mine = self.end
        attributes = pyverbs_module("qp").QPAttr(port_num=self._device.port.number)
        attributes.qp_access_flags = verbs_enums().IBV_ACCESS_REMOTE_READ if self._served else 0
        attributes.dest_qp_num = peer.number
        attributes.rq_psn, attributes.sq_psn = peer.first_packet, self._psn
        attributes.path_mtu = min(mine.mtu, peer.mtu)
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = min(mine.reads, peer.reads)
        attributes.timeout, attributes.retry_cnt = TIMEOUT, RETRIES
        attributes.min_rnr_timer, attributes.rnr_retry = SHORTEST_WAIT, FOR_EVER
        attributes.ah_attr = self._route_to(peer)
        self._pair.to_rts(attributes)

    def read(self, number: int, to: int, local_key: int, source: int, remote_key: int, length_bytes: int) -> None:
        """Post a READ of the peer's memory at ``source`` into local memory at ``to``. Its completion has ``number``."""
        wr = pyverbs_module("wr")
        into = wr.SGE(to, length_bytes, local_key)
        request = wr.SendWR(wr_id=number, opcode=verbs_enums().IBV_WR_RDMA_READ, num_sge=1, sg=[into])
        request.set_wr_rdma(remote_key, source)
        self._pair.post_send(request)

    def close(self) -> None:
        """Close the queue pair. After this, posted reads write nothing any more."""
        self._pair.close()

    def _route_to(self, peer: QueueEnd) -> object:
        addr, port = pyverbs_module("addr"), self._device.port
        if port.link_layer != ETHERNET:
            return addr.AHAttr(dlid=peer.lid, is_global=0, port_num=port.number)
        route = addr.GlobalRoute(dgid=addr.GID(peer.gid), sgid_index=port.gid_index, hop_limit=HOPS)
        return addr.AHAttr(gr=route, is_global=1, port_num=port.number)


def _event_descriptors() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == EVENTS:
                found.add(int(name))
        except OSError:
            # This was the descriptor of listdir itself.
            continue
    return found
