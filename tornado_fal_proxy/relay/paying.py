"""Hold a call against the operator's limits on spending: who its user is, whether it may run, what it is tagged with.

Strategy. The head of a request decides who the user is, and what of a queued job is theirs. The body decides how much
the call may cost, so a paid call is reserved when its body is whole, and before anything leaves for fal. A
:class:`~tornado_fal_proxy.spending.calls.SpendingCall` follows it from there. Free calls never touch the store, except
those that end a job.
"""

from __future__ import annotations

import json
import random
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from tornado_fal_proxy.errors import ClientDisconnected, JobNotFound, Misconfigured
from tornado_fal_proxy.relay.backend import Backend
from tornado_fal_proxy.relay.hooks import HookedResponse, result_of
from tornado_fal_proxy.rules.endpoints import QUEUE_HOST, may_name_job
from tornado_fal_proxy.rules.excerpt import excerpt
from tornado_fal_proxy.rules.headers import Pairs
from tornado_fal_proxy.rules.target import Target
from tornado_fal_proxy.spending.calls import JobCall, PaidCall
from tornado_fal_proxy.spending.identity import identity, tag_of
from tornado_fal_proxy.spending.limits import MILLION
from tornado_fal_proxy.spending.plans import NO_RULES, Plan, SpendingRules
from tornado_fal_proxy.spending.prices import estimated_units
from tornado_fal_proxy.upstream.transfer import Transfer

__all__ = ["TAGS", "PayingResponse"]

TAGS = "x-fal-tags"


class Payer(NamedTuple):
    """The user of a paid call, what they may do, and the endpoint that they call."""

    rules: SpendingRules
    user: str
    plan: Plan
    endpoint: str


class PayingResponse(HookedResponse):
    """Decide what a call may cost, where an option of spending is set."""

    _own_rules: SpendingRules | None = None
    _pairs: Pairs
    _payer: Payer | None = None
    #: Header lines for fal that name the user. No ``Connection`` of the client's removes them.
    _tags: tuple[bytes, ...] = ()

    def __init_subclass__(cls) -> None:
        """Note whether a subclass checks inputs: then there is something to do without any option too."""
        super().__init_subclass__()
        cls._own_rules = None if cls.check_input is PayingResponse.check_input else NO_RULES

    async def identify(self, target: Target) -> Any:
        """Return the user's id, of up to 128 printable characters; or the id and the name of a plan; or None.

        None stands for the client's address. Asked where a limit needs it: for paid calls, and for those of a queued
        job with ``own_jobs_only``. Calls ``ProxyConfig.identify``.
        """
        identify = self._config.identify
        return None if identify is None else await result_of(identify(self, target))

    async def check_input(self, target: Target, body: bytes) -> Any:
        """Check the body of a paid call before anything leaves. To refuse raise :class:`tornado.web.HTTPError`.

        Calls ``ProxyConfig.check_input``.
        """
        check_input = self._config.check_input
        return None if check_input is None else await result_of(check_input(self, target, body))

    # The request's head.

    async def _begin_spending(self, rules: SpendingRules, backend: Backend, target: Target) -> None:
        """Find out who pays. Raise JobNotFound, AccessRefused, Misconfigured or ClientDisconnected."""
        call, job_id = self.call, target.job_id
        call.job_id = job_id
        if rules.tags_users:
            self._pairs = [(name, value) for name, value in self._pairs if name != TAGS]
        if rules.own_jobs_only and (job_id is not None or may_name_job(target)):
            await self._check_owner(rules, backend, target)
        if job_id is not None:
            if rules.needs_store:
                self._spent = JobCall(backend.ledger, job_id, target.kind)
        elif target.paid:
            user, plan = await self._identify(rules, backend, target)
            endpoint = target.endpoint
            self._payer = Payer(rules, user, plan, endpoint)
            if rules.tags_users:
                self._tags = (f"{TAGS}: {tag_of(user)}".encode(),)
            call.user, call.plan, call.endpoint = user, plan.name, endpoint
            if plan.access is not None:
                plan.access.check(target.method, target)

    async def _check_owner(self, rules: SpendingRules, backend: Backend, target: Target) -> None:
        """Raise JobNotFound unless the target's job is the user's."""
        if target.job_id is None:
            raise JobNotFound(f"own_jobs_only: an odd spelling: {excerpt(target.host + target.path)}")
        user, _ = await self._identify(rules, backend, target)
        self.call.user = user
        allowed = await backend.ledger.may_read(target.job_id, user)
        self._check_connection()
        if not allowed:
            raise JobNotFound(f"own_jobs_only: {target.job_id} is no job of its user's")

    async def _identify(self, rules: SpendingRules, backend: Backend, target: Target) -> tuple[str, Plan]:
        result = None
        backend.watch(self._connection.stream)
        if self._config.identify is not None or type(self).identify is not PayingResponse.identify:
            result = await self._ask(self.identify, target)
        try:
            user, name = identity(result, self.request.remote_ip or "")
        except ValueError as exc:
            raise Misconfigured(f"identify {exc}") from None
        plan = rules.plan(name)
        if plan is None:
            raise Misconfigured(f"identify returned a plan that plans does not have: {excerpt(name or '')}")
        return user, plan

    # The request's body.

    async def _reserve(self, payer: Payer, backend: Backend, target: Target, body: bytes) -> None:
        """Reserve a paid call. Raise a ProxyError where it may not run; then nothing of it is left in the store."""
        rules, user, plan, endpoint = payer
        if plan.access is not None and plan.access.needs_body(target):
            plan.access.check_body(target, body)
        if self._config.check_input is not None or type(self).check_input is not PayingResponse.check_input:
            await self._ask(self.check_input, target, body)
        if not rules.needs_store:
            return
        units = None if self._config.input_units is None else await self._estimate(target, body)
        ledger = backend.ledger
        now = ledger.now()
        own_id = f"{int(now):08x}{random.getrandbits(96):024x}"  # by time, because a store keeps neighbours together
        terms = rules.terms(user, plan, endpoint, units, now, own_id)
        paid = PaidCall(ledger, terms, queued=target.host == QUEUE_HOST)
        await paid.reserve()
        self._spent = paid
        try:
            self._check_connection()
        except ClientDisconnected:
            paid.abandon(None, sent=False)
            raise

    async def _estimate(self, target: Target, body: bytes) -> int | None:
        """Return the estimated millionths of a unit, by the operator's function; None without one."""
        if (input_units := self._config.input_units) is None:
            return None
        result = await self._ask(input_units, target, _input_of(target, body))
        try:
            return estimated_units(result)
        except ValueError as exc:
            raise Misconfigured(f"input_units: its result {exc}") from None

    def _check_connection(self) -> None:
        """Raise ClientDisconnected where the client has left while the store was asked."""
        if self._connection.stream.closed():
            raise ClientDisconnected

    # Ends.

    def _end_spending(self, transfer: Transfer | None) -> None:
        """Note that a call is over, unless that is noted."""
        if self._spent is None:
            return
        if transfer is None:
            self._spent.abandon(None, sent=False)
        else:
            self._spent.abandon(transfer.head, sent=transfer.may_have_been_sent)

    def _end_call(self, error: BaseException | None = None) -> None:
        if self._spent is not None and not self._ended:
            call, spent = self.call, self._spent
            call.job_id, call.user, call.endpoint = (
                spent.job_id,
                spent.user or call.user,
                spent.endpoint or call.endpoint,
            )
            call.units = None if spent.units is None else Decimal(spent.units) / MILLION
            call.cost = None if spent.cost is None else Decimal(spent.cost) / MILLION
            call.billed = spent.billed
        super()._end_call(error)


def _input_of(target: Target, body: bytes) -> dict[str, Any]:
    """Return the input of a paid call: the JSON object in its body, or the query of a GET.

    The values of a query are texts, and lists of them where a name comes twice.
    """
    if target.method == "GET":
        values = parse_qs(target.query or "", keep_blank_values=True)
        return {name: texts[0] if len(texts) == 1 else texts for name, texts in values.items()}
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
