"""More than one process: what low rank saves of the bytes that DistributedDataParallel reduces."""

from subspan.distributed.compression import compress_gradients
from subspan.distributed.exclusion import exclude_from_ddp
from subspan.distributed.power_sgd import power_sgd
from subspan.distributed.traffic import Traffic, count_traffic, traffic_table

__all__ = ["Traffic", "compress_gradients", "count_traffic", "exclude_from_ddp", "power_sgd", "traffic_table"]
