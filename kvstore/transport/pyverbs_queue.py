"""One end of a reliable connection, made with pyverbs."""

from __future__ import annotations

import errno
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvstore.transport import pyverbs_sysfs as sysfs
from kvstore.transport.pyverbs_import import code, translated
from kvstore.transport.pyverbs_post import ExtendedPoster, PlainPoster, Poster
from kvstore.transport.verbs import (
    QueueAddress,
    QueuePair,
    QueueSetup,
    QueueTuning,
    VerbsClosed,
    VerbsError,
    Work,
)

if TYPE_CHECKING:
    from kvstore.transport.pyverbs_layer import PyRail

# Seven is for ever with some devices (rxe).
_RETRY_COUNT_MAX = 6
# Routers that a packet may pass.
_HOPS_MAX = 64
_MTUS = (256, 512, 1024, 2048, 4096)
# The default partition.
_PARTITION = 0


class PyQueuePair(QueuePair):
    """See `kvstore.transport.verbs.QueuePair`. It takes receives from the start."""

    def __init__(self, rail: PyRail, setup: QueueSetup) -> None:
        modules = rail.modules
        self.closed = False
        self._rail = rail
        self._setup = setup
        self._connected = False
        self._receives = 0
        # Drawn, so that what an earlier connection left in the network fits to none.
        self._psn = secrets.randbits(24)
        try:
            self._queue, self._poster = _make(rail, setup)
        except modules.error as error:
            raise translated(f"{rail.name}: make a queue pair", error) from error
        self.number = int(self._queue.qp_num)
        self.name = f"{rail.name}: queue pair {self.number:#x}"
        try:
            self._queue.to_init(self._attributes())
        except modules.error as error:
            self.close()
            raise translated(f"{self.name}: initialise", error) from error

    def address(self) -> QueueAddress:
        self._check()
        rail = self._rail
        return QueueAddress(self.number, self._psn, rail.gid, rail.lid, rail.mtu_bytes)

    def connect(self, peer: QueueAddress, tuning: QueueTuning) -> None:
        self._check()
        rail, modules = self._rail, self._rail.modules
        what = f"{self.name}: connect to {peer.number:#x} at {peer.gid or peer.lid}"
        mtu_bytes = min(rail.mtu_bytes, peer.mtu_bytes)
        if not 0 <= tuning.retry_count <= _RETRY_COUNT_MAX:
            raise VerbsError(
                f"{what}: retry_count={tuning.retry_count}: must be from 0 to {_RETRY_COUNT_MAX}"
            )
        if mtu_bytes not in _MTUS:
            raise VerbsError(f"{what}: mtu_bytes={peer.mtu_bytes}: must be one of {_MTUS}")
        if self._connected:
            raise VerbsError(f"{what}: it is connected already")
        try:
            attributes = self._attributes()
            attributes.path_mtu = (mtu_bytes >> 7).bit_length() - 1
            attributes.dest_qp_num = peer.number
            attributes.rq_psn = peer.psn
            attributes.sq_psn = self._psn
            reads_max = min(tuning.reads_max, rail.reads_max)
            attributes.max_rd_atomic = attributes.max_dest_rd_atomic = reads_max
            attributes.min_rnr_timer = tuning.min_rnr_timer
            attributes.timeout = tuning.timeout
            attributes.retry_cnt = tuning.retry_count
            attributes.rnr_retry = tuning.rnr_retry
            attributes.ah_attr = _way(rail, peer, tuning)
            self._queue.to_rts(attributes)
        except (modules.error, OverflowError, ValueError) as error:
            raise translated(what, error) from error
        self._connected = True

    def post(self, works: Sequence[Work]) -> None:
        self._check()
        if not works:
            return
        if not self._connected:
            raise VerbsError(f"{self.name}: work for one that is not connected")
        if len(works) > self._setup.sends_max:
            raise VerbsError(
                f"{self.name}: {len(works)} work requests: sends_max={self._setup.sends_max}"
            )
        pieces_max = max(map(len, (work.pieces for work in works)))
        if pieces_max > self._setup.pieces_max:
            raise VerbsError(f"{self.name}: {pieces_max} pieces: at most {self._setup.pieces_max}")
        try:
            self._poster.post(works)
        except (self._rail.modules.error, OverflowError) as error:
            raise translated(f"{self.name}: post {len(works)} work requests", error) from error

    def post_receives(self, count: int) -> None:
        self._check()
        if self._receives + count > self._setup.receives_max:
            raise VerbsError(
                f"{self.name}: {self._receives + count} receives out: at most "
                f"{self._setup.receives_max}"
            )
        try:
            self._rail.receives.post(self._queue, count)
        except self._rail.modules.error as error:
            raise translated(f"{self.name}: post {count} receives", error) from error
        self._receives += count

    def received(self) -> None:
        """A receive of it has completed."""
        self._receives -= 1

    def flush(self) -> None:
        self._check()
        modules = self._rail.modules
        attributes = modules.qp.QPAttr(qp_state=modules.enums.IBV_QPS_ERR)
        try:
            self._queue.modify(attributes, modules.enums.IBV_QP_STATE)
        except modules.error as error:
            raise translated(f"{self.name}: flush", error) from error

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        queue, self._queue = self._queue, None
        self._poster.close()
        self._rail.forget(self, queue)

    def _check(self) -> None:
        if self.closed:
            raise VerbsClosed(f"{self.name} is closed")

    def _attributes(self) -> Any:
        """Attributes of the first state, which the later ones keep."""
        modules, enums = self._rail.modules, self._rail.modules.enums
        attributes = modules.qp.QPAttr(port_num=self._rail.port)
        attributes.pkey_index = _PARTITION
        attributes.qp_access_flags = (
            enums.IBV_ACCESS_LOCAL_WRITE
            | enums.IBV_ACCESS_REMOTE_WRITE
            | enums.IBV_ACCESS_REMOTE_READ
        )
        return attributes


def _make(rail: PyRail, setup: QueueSetup) -> tuple[Any, Poster]:
    """A queue pair of pyverbs, and what posts on it."""
    modules = rail.modules
    qp, enums = modules.qp, modules.enums
    limits = qp.QPCap(
        max_send_wr=setup.sends_max,
        max_recv_wr=setup.receives_max,
        max_send_sge=setup.pieces_max,
        max_recv_sge=1,
    )
    common = {"qp_type": enums.IBV_QPT_RC, "scq": rail.cq, "rcq": rail.cq, "cap": limits}
    if rail.extended:
        attributes = qp.QPInitAttrEx(
            **common,
            sq_sig_all=0,
            pd=rail.domain,
            comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
            send_ops_flags=enums.IBV_QP_EX_WITH_RDMA_WRITE
            | enums.IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
            | enums.IBV_QP_EX_WITH_RDMA_READ,
        )
        try:
            made = qp.QPEx(rail.context, attributes)
            return made, ExtendedPoster(modules, made, setup.pieces_max, not rail.soft)
        except modules.error as error:
            if code(error) not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            rail.extended = False  # the driver has no such interface
    made = qp.QP(rail.domain, qp.QPInitAttr(**common, sq_sig_all=0))
    return made, PlainPoster(modules, made)


def _way(rail: PyRail, peer: QueueAddress, tuning: QueueTuning) -> Any:
    """How packets get to the peer."""
    addr = rail.modules.addr
    common = {"port_num": rail.port, "sl": tuning.service_level, "dlid": peer.lid}
    if rail.gid_index < 0:
        return addr.AHAttr(is_global=0, **common)
    if not peer.gid:
        raise ValueError("the peer has no gid, and we have one")
    route = addr.GlobalRoute(
        dgid=addr.GID(sysfs.gid_groups(peer.gid)),
        sgid_index=rail.gid_index,
        hop_limit=_HOPS_MAX,
        traffic_class=tuning.traffic_class,
    )
    return addr.AHAttr(is_global=1, gr=route, **common)
