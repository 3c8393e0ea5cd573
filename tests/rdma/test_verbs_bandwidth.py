"""Shows the speed of RDMA reads beside the raw transport's own benchmark. It sets no limit, since machines differ."""

from collections.abc import Callable

from loraserve.testing.verbs_bandwidth import measure


def test_bandwidth_beside_perftest(say: Callable[[str], None]) -> None:
    for slab in measure([1, 16], rounds=1):
        beside = "no perftest" if slab.ib_read_bw is None else f"ib_read_bw {slab.ib_read_bw:.1f} MiB/s"
        ratio = "" if slab.ratio is None else f", verbs / ib_read_bw {slab.ratio:.2f}"
        say(f"slab of {slab.slab_mib} MiB: verbs {slab.verbs:.1f} MiB/s, {beside}{ratio}")
        assert slab.verbs > 0
        assert slab.ib_read_bw is None or slab.ib_read_bw > 0
