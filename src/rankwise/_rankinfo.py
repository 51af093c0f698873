"""Where one rank stands in its group: the value that ``worker_info()`` returns.

Every worker imports this file on its way up, so it imports nothing but ``collections``, and stays
apart from the checks in ``_spec``, which only the driver needs.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import NamedTuple

    class RankInfo(NamedTuple):
        rank: int
        world_size: int
        local_rank: int
        local_world_size: int
        node_rank: int
        num_nodes: int
        group: str
        device: int | None
        master_addr: str
        master_port: int

else:
    from collections import namedtuple

    RankInfo = namedtuple(
        "RankInfo",
        "rank world_size local_rank local_world_size node_rank num_nodes"
        " group device master_addr master_port",
        module=__name__,
    )
    RankInfo.__doc__ = """One rank's place in its group, frozen and picklable.

    rank, world_size              this rank's number, from 0, and how many ranks the group has
    local_rank, local_world_size  the same, counted on this rank's node alone
    node_rank, num_nodes          this node's number, from 0, and how many nodes the group has
    group                         the group's name
    device                        index of this rank's device as its own process sees it (0 where
                                  only one is visible); None where no devices were asked for
    master_addr, master_port      where torch.distributed's rendezvous is, as torchrun sets them
    """
