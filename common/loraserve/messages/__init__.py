"""All messages of the cluster: one module per direction, and one union per process kind of the messages it receives.

Messages are frozen msgspec structs. A process decodes them strictly against its union. New fields must have defaults.
A new or changed tag needs a new ``PROTOCOL_VERSION``. Tensors and slabs travel as raw frames beside structs.
"""

from loraserve.messages.admin import MetricsTold, Ping, Pong, StoryLine, StoryTold, TellMetrics, TellStory
from loraserve.messages.base import PROTOCOL_VERSION, AdapterRef, Message
from loraserve.messages.engine_engine import (
    LeaseGranted,
    LeaseReleased,
    LeaseRenewed,
    LeaseSlab,
    ReleaseLease,
    RenewLease,
    SlabDamaged,
)
from loraserve.messages.engine_gateway import Failed, TokenBatch, TokenDelta
from loraserve.messages.engine_monitor import (
    AdapterState,
    AdapterTokens,
    AnnounceCapabilities,
    Copies,
    EngineCapabilities,
    EngineCounters,
    EngineGone,
    EngineLoad,
    EngineStatistics,
    FindCopies,
    Holder,
    MeanLoad,
    MeanStep,
    MeasuredSpeed,
    MemoryLoad,
    PrefetchCounts,
    QueueLoad,
    ReadCounts,
    ResidentAdapter,
)
from loraserve.messages.gateway_engine import Abort
from loraserve.messages.gateway_planner import Drain, GetPlan, Rebalance, RebalanceDone
from loraserve.messages.gateway_router import Expect, Rejected, Route, Routed
from loraserve.messages.monitor_cluster import AdapterDemand, ClusterLoad, ClusterStatistics, EngineSeen
from loraserve.messages.planner_engine import Prepared, PreparePlan, RetireCopies, RetireDone
from loraserve.messages.planner_router import Move, Placement, Plan
from loraserve.messages.router_engine import Admit, Admitted, ExpectAdapter
from loraserve.messages.sampling import SamplingParams
from loraserve.messages.store import (
    AdapterList,
    AdapterRegistered,
    AdapterUnregistered,
    ListAdapters,
    OpenSlab,
    ReadSlab,
    RegisterAdapter,
    RegistryChanged,
    SlabChunk,
    SlabInfo,
    UnregisterAdapter,
)
from loraserve.messages.transfer import ConnectQueue, QueueConnected, QueueEnd, ReadRegion, RegionChunk

ToGateway = (
    TokenBatch
    | Failed
    | ClusterLoad
    | ClusterStatistics
    | EngineGone
    | RegistryChanged
    | TellMetrics
    | Ping
    | TellStory
)
ToRouter = Route | Expect | ClusterLoad | Plan | Ping | TellStory
ToMonitor = EngineLoad | EngineStatistics | EngineCapabilities | FindCopies | RegistryChanged | Ping | TellStory
ToPlanner = ClusterLoad | RegistryChanged | Rebalance | Drain | GetPlan | Ping | TellStory
ToEngine = (
    Admit
    | Abort
    | ExpectAdapter
    | PreparePlan
    | RetireCopies
    | LeaseSlab
    | RenewLease
    | ReleaseLease
    | SlabDamaged
    | ReadRegion
    | ConnectQueue
    | EngineGone
    | AnnounceCapabilities
    | Ping
    | TellStory
)
ToStore = RegisterAdapter | UnregisterAdapter | ListAdapters | OpenSlab | ReadSlab | Ping | TellStory
