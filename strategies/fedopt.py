"""FedOpt (Reddi et al. 2021): a sampled cohort, a weighted mean of updates, a server optimizer.

Every method of the study is this strategy: 5 client optimizers x the server optimizers.
"""

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from clients.client_optimizers import OptimizerFactory
from fedinit.cohort import ARRAYS, CohortSums, array_records
from fedinit.device import threads_for
from fedinit.parameters import Array, Layout
from fedinit.randomness import Draw, keyed


def draw_cohort(seed: int, server_round: int, clients: int, size: int) -> list[int]:
    """Draw a round's cohort, without replacement: positions in the sorted node ids, ascending."""
    order = keyed(Draw.COHORT, seed, server_round).permutation(clients)
    return sorted(order[:size].tolist())


class FedOpt(Strategy):
    """x <- SERVEROPT(x, D) with D the mean of the cohort's updates, weighted by their examples.

    Only trainable arrays are stepped; float buffers take the weighted mean, integers are copied.
    Of a round's replies the metrics stay: a subclass reads their arrays before `aggregate_train`.

    Args:
        server_optimizer: builds the server optimizer, a `torch.optim.Optimizer`, over the vector x.
        layout: which arrays are trainable, and in what order they make the vector x.
        cohort: number of clients in a round.
        clients: number of clients in all; a round does not begin before they are all there.
        seed: with the round's number it fixes the cohort, over the sorted node ids.
        share_state: for mimelite clients: they receive the optimizer's state, which is then
            refreshed with the mean of their `gradients` at x, while x -= lr D.
        server_lr: the rate of that last step; read only with `share_state`.
        skip_failed: average the clients that did not fail; otherwise a failure ends the run.
    """

    reduces_in_worker = True  # its reduction is a weighted mean: RayGrid may do most of it

    def __init__(
        self,
        server_optimizer: OptimizerFactory,
        layout: Layout,
        cohort: int,
        clients: int,
        seed: int = 0,
        share_state: bool = False,
        server_lr: float = 1.0,
        skip_failed: bool = False,
    ) -> None:
        self.layout = layout
        self.cohort = cohort
        self.clients = clients
        self.seed = seed
        self.share_state = share_state
        self.server_lr = server_lr
        self.skip_failed = skip_failed
        self._build = server_optimizer
        self._point: Tensor | None = None  # the vector that the server optimizer steps on
        self._optimizer: torch.optim.Optimizer | None = None
        self._arrays = ArrayRecord()
        self._restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the server optimizer's state: tensors by torch's names."""
        if self._point is None or self._optimizer is None:
            return dict(self._restored)
        return dict(self._optimizer.state[self._point])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a server optimizer's state; before the first round."""
        self._restored = state

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send x, and the optimizer's state where it is shared, to the round's cohort."""
        while len(nodes := sorted(grid.get_node_ids())) < self.clients:
            time.sleep(0.1)  # under Flower's runtime the nodes register one by one
        self._arrays = arrays
        chosen = draw_cohort(self.seed, server_round, len(nodes), self.cohort)
        told = ConfigRecord({**config, "server-round": server_round})
        content = RecordDict({ARRAYS: arrays, "config": told})
        if self.share_state:
            content["server-state"] = self._state(self.layout.flatten(arrays))
        return [
            Message(content, dst_node_id=nodes[index], message_type=MessageType.TRAIN)
            for index in chosen
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Form D from the replies and step.

        The replies' arrays are taken out of them: Flower's loop keeps the replies while those of
        the next round are made, which can then have their room in Ray's store.

        Raises:
            RuntimeError: a client failed, and survivors are not to be averaged; or none replied.
        """
        start = self.layout.flatten(self._arrays)
        sums = CohortSums(self.layout, alignment=False)
        failed = ""
        replies = sorted(replies, key=lambda each: each.metadata.src_node_id)
        for reply in replies:
            if not reply.has_error():
                sums.add(start, reply.content)
                continue
            failed = failed or f"node {reply.metadata.src_node_id} failed: {reply.error.reason}"
            if not self.skip_failed:
                raise RuntimeError(f"round {server_round}: {failed}")
        if not sums.clients:
            raise RuntimeError(f"round {server_round}: no client survived; {failed or 'no reply'}")
        for content in [each.content for each in replies if each.has_content()]:
            for name in array_records(content):
                del content[name]
        with threads_for(len(start)):
            point = self._step(start, sums)
        rest = sums.mean_rest(self.layout.rest(self._arrays))
        return self.layout.record(point, rest), MetricRecord(dict(sums.mean_metrics()))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No evaluation on clients: x is evaluated on the test set."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Nothing was asked of the clients."""
        return None

    def summary(self) -> None:
        """Log the strategy's settings."""
        logger = logging.getLogger("flwr")
        logger.info("\t└──> FedOpt: cohort %s of %s clients", self.cohort, self.clients)

    def _step(self, start: Tensor, sums: CohortSums) -> Tensor:
        point, optimizer = self._at(start)
        gradient = sums.pseudo_gradient().to(start.dtype)
        if self.share_state:
            # A step on a point that is then put aside refreshes the state with the gradient at x.
            point.grad = sums.mean_extra("gradients")["gradient"].to(start.dtype)
            optimizer.step()
            return start - self.server_lr * gradient
        point.grad = gradient
        optimizer.step()
        return point.detach()

    def _at(self, start: Tensor) -> tuple[Tensor, torch.optim.Optimizer]:
        if self._point is None or self._optimizer is None:
            self._point = torch.nn.Parameter(start)
            self._optimizer = self._build([self._point])
            self._optimizer.state[self._point].update(self._restored)
        self._point.data = start.clone()  # x is others' to read: the step is on a copy
        return self._point, self._optimizer

    def _state(self, start: Tensor) -> ArrayRecord:
        point, optimizer = self._at(start)
        record = ArrayRecord()
        for name, value in optimizer.state[point].items():
            if isinstance(value, Tensor):  # SGD's state names a buffer before it has one
                record[name] = Array(value.clone().numpy())
        return record
