"""Which replica answers: the one that a dialogue began with, or the less busy of two."""

from __future__ import annotations

import random

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class SessionRouter(ConsistentHashRouter):
    """Sends all requests of one session id to one replica, chosen by consistent hashing; all others by their load.

    A request without a session id goes to the shorter queue of two random replicas. Ray ships this class to its proxies
    by value, so that they need not have covo_npu.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return replicas to try, in ranks; in a rank the shortest queue is taken."""
        if pending_request is None or pending_request.metadata.session_id:
            ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
            return ranks
        pending_request.routing_context.should_backoff = True
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
