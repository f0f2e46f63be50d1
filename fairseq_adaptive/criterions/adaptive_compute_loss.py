"""The loss of models that spend compute where it pays: ``--criterion adaptive_compute_loss``.

A task's loss and the prices of the model's policies. (fairseq's ``adaptive_loss`` is that of an adaptive softmax.)
"""

import inspect
import json
from typing import Dict, List, Optional, Tuple

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from torch import Tensor

from fairseq_adaptive.criterions.adaptive_compute_config import AdaptiveComputeLossConfig
from fairseq_adaptive.criterions.controller import COMPUTE, TARGETS, Controller, warmed_up
from fairseq_adaptive.criterions.decisions import Decision, decisions
from fairseq_adaptive.criterions.distillation import Teacher
from fairseq_adaptive.criterions.expected_output import ExpectedOutput, check_expected
from fairseq_adaptive.criterions.on_target import SUFFIX, log_on_target, wanted
from fairseq_adaptive.criterions.steering import Steering
from fairseq_adaptive.criterions.task_criterion import build_task_criterion, check_model
from fairseq_adaptive.errors import UsageError
from fairseq_adaptive.modules import LayerStack, recording
from fairseq_adaptive.modules.watched import Watched
from fairseq_adaptive.ranges import NUMBER, PRICE, RATE, UPDATES, check_ranges


def _objects(flag: str, text: str) -> Dict:
    try:
        found = json.loads(text)
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError) as error:
        raise UsageError(f'{flag} {text!r} is no JSON object: write {{"name": value}}') from error


def _order(policy) -> int:
    return ("router", "halting", "search").index(policy.kind)


def _check_numbers(numbers: Dict, name: str, within) -> None:
    others = {"warmup_updates": UPDATES, "prior_rate": RATE}
    for key, number in numbers.items():
        others.get(key, within).check(number, f"{key} in {name}")


@register_criterion("adaptive_compute_loss", dataclass=AdaptiveComputeLossConfig)
class AdaptiveComputeLoss(FairseqCriterion):
    """Loss of the task + the sum over the model's policies of weight x price.

    Prices are those that the policies ask, see :meth:`fairseq_adaptive.modules.policies.Policy.price`: means over the
    tokens of a batch, in which padding never counts. A kind of policies with a target is steered instead: a controller
    weighs the policies' levers. Where a halting rule weighs depths, PonderNet's, the loss of the task is the expected
    one. The logged ``loss`` is that of the task alone. Logged besides: of each policy its ``price``, that price's
    ``weight`` and what the policy measures, under its name.

    A task criterion that prices policies itself keeps them: this one prices the others.

    Args:
        cfg: :class:`AdaptiveComputeLossConfig`
        task: keeps the states of controllers, so that a resumed training goes on exactly
        task_criterion: the criterion of the task

    Raises:
        UsageError: for impossible flags; :meth:`check_model`, for a model without policies
    """

    kinds: Tuple[str, ...] = ("router", "halting", "reader", "search")
    mark = "adaptive_"  # begins, or is in, the names of the sums that are logged
    needs = "adaptive_compute_loss needs a model with a policy: add --router, --halting or --reader,"
    advice = ("a lower weight in --prices or with warmup_updates there", "raise its weight in --prices")
    task_class = None
    targets, followed, wanted = {}, {}, None  # of the class that reduces what is logged

    def __init__(self, cfg, task, task_criterion):
        super().__init__(task)
        check_ranges(cfg, type(self))
        self.cfg, self.task_criterion = cfg, task_criterion
        self.prices = _objects("--prices", getattr(cfg, "prices", "{}"))
        self.task_name = getattr(cfg, "task_criterion", "adaptive_cross_entropy")
        inner = getattr(task_criterion, "kinds", ())
        self.kinds = tuple(kind for kind in self.kinds if kind not in inner)
        if not self.kinds:
            raise UsageError(
                f"--task-criterion {self.task_name} is no criterion of a task: name one such as "
                "cross_entropy, masked_lm or sentence_prediction"
            )
        self.controllers = {}
        for name, settings in self.steering().items():
            target = self.target(name)
            if target.kind in self.kinds:
                self.controllers[target.kind] = Controller(task, target, **settings)
            elif settings["value"] is not None and self.compute is None:
                raise UsageError(
                    f"{target.flag} steers what --task-criterion {self.task_name} prices: give it "
                    "in --task-criterion-args, or take another criterion"
                )
        self._check_metric()
        self._steering = Steering(self.controllers, self.advice)
        self._teacher = None  # no module: it is not trained
        if getattr(cfg, "distill_from", None):
            self._teacher = Teacher(cfg.distill_from, task)

    @classmethod
    def build_criterion(cls, cfg, task):
        if cls.task_class is not None:
            return cls(cfg=cfg, task=task)
        check_ranges(cfg, cls)
        task_criterion = build_task_criterion(cfg, task)
        # fairseq asks the class, not the instance, how to reduce what it logs
        own = type(cls.__name__, (cls,), {"task_class": type(task_criterion), "wanted": wanted(cfg)})
        return own(cfg, task, task_criterion)._follow()

    def _follow(self):
        """fairseq gives what all workers have evaluated to the class alone: let it know whose targets those are."""
        type(self).targets = self.valued()
        type(self).followed = {self._name_of(each): each for each in self.controllers.values()}
        return self

    @property
    def compute(self) -> Optional[float]:
        """``--compute``; None: it is not given, or the criterion has no such flag."""
        return getattr(self.cfg, "compute", None)

    def target(self, name: str):
        """The target of a name."""
        return COMPUTE[name] if self.compute is not None and name in COMPUTE else TARGETS[name]

    def _name_of(self, controller: Controller) -> str:
        every = COMPUTE if self.compute is not None else TARGETS
        return next(name for name, target in every.items() if target is controller.target)

    def valued(self) -> Dict[str, float]:
        """The targets that are given, here or to the task's criterion, names and values."""
        own = {self._name_of(each): each.value for each in self.controllers.values() if each.value is not None}
        theirs = self.task_criterion.valued() if hasattr(self.task_criterion, "valued") else {}
        return {**theirs, **own}

    def _check_metric(self):
        if self.wanted is not None and not self.valued():
            raise UsageError(
                f"--best-checkpoint-metric {self.wanted.quality}{SUFFIX} needs a target, such as --target-flops 0.5; "
                f"without one say {self.wanted.quality}"
            )

    def prepare_targets(self, updates: Optional[int]):
        """Say how many updates the training has, None: no end; fairseq-train does."""
        self._steering.prepare(updates)

    def report_targets(self, updates: int):
        """Warn of targets that were missed, at the end of a training."""
        self._steering.report(updates)

    def steering(self) -> Dict[str, Dict]:
        """Of each of the :data:`TARGETS` that has a controller what the controller takes."""
        given, settings = _objects("--target-args", self.cfg.target_args), {}
        if self.compute is not None:
            named = [TARGETS[name].flag for name in TARGETS if getattr(self.cfg, f"target_{name}") is not None]
            if named or given:
                raise UsageError(
                    f"--compute takes the place of {', '.join(named) or '--target-args'}: leave one of them out"
                )
            return {name: {"value": self.compute} for name in COMPUTE}
        for name in TARGETS:
            value, more = getattr(self.cfg, f"target_{name}"), given.pop(name, {})
            if more and value is None:
                raise UsageError(f"--target-args says how to steer {name}: add {TARGETS[name].flag}")
            if not isinstance(more, dict) or set(more) - {"weight", "gain", "rate", "warmup_updates"}:
                raise UsageError(f"--target-args {name}: give weight, gain, rate and warmup_updates, not {more}")
            _check_numbers(more, f"--target-args {name}", PRICE)
            if value is not None or name == "depth":  # depth is watched in any case
                settings[name] = {"value": value, **more}
        if given:
            raise UsageError(f"--target-args {', '.join(given)}: its names are {', '.join(TARGETS)}")
        return settings

    def options(self, decision: Decision) -> Dict:
        """The weight of a policy's price, ``warmup_updates``, and options of that price."""
        policy, found = decision.policy, {}
        for key in dict.fromkeys((policy.kind, policy.policy_name, decision.label)):
            given = self.prices.get(key, {})
            found.update(given if isinstance(given, dict) else {"weight": given})
        return found

    def check_model(self, model) -> None:
        """Called before training starts.

        Args:
            model: a fairseq model

        Raises:
            UsageError: when this criterion cannot train it, or flags name or steer what it has not
        """
        found, (weighed, _) = self.found(model), self._weighed(model)
        for each in found:
            self._check_price(each)
        if weighed:
            self._check_weighed(model)
        check_model(self.task_criterion, Watched(model) if weighed or self._teacher is not None else model)

    def _check_price(self, decision):
        options = AdaptiveComputeLoss.options(self, decision)  # those that come from a text
        known = inspect.signature(decision.policy.price).parameters
        names = ["weight", "warmup_updates", *list(known)[1:]]
        for option in options:
            if option not in names:
                raise UsageError(f"the price of {decision.label} has no option {option!r}: give {', '.join(names)}")
        _check_numbers(options, f"the price of {decision.label}", NUMBER)

    def _check_weighed(self, model):
        if self.controllers["halting"].value is not None:
            flag = self.controllers["halting"].target.flag
            raise UsageError(f"{flag} steers ACT's time penalty; with PonderNet, set --prior-rate to 1 over it")
        if self._teacher is not None:
            raise UsageError(
                "--distill-from learns one output, and PonderNet trains those of all depths: use --halting act"
            )
        check_expected(model, getattr(self.task_criterion, "regression_target", False))

    def _weighed(self, model):
        """Whether training expects the loss over depths, and the stack from which the model's output is made."""
        stacks = [module for module in model.modules() if isinstance(module, LayerStack)]
        last = stacks[-1] if stacks else None
        weighed = "halting" in self.kinds and last is not None and last.halting is not None
        return weighed and last.halting.weighs_depths and not isinstance(model, ExpectedOutput), last

    def found(self, model) -> List[Decision]:
        """The decisions that this criterion prices.

        Raises:
            UsageError: where there are none, or not those that flags name
        """
        every = decisions(model)
        found = [each for each in every if each.policy.kind in self.kinds]
        names = {name for each in found for name in (each.policy.kind, each.policy.policy_name, each.label)}
        for name in self.prices:
            if name not in names:
                raise UsageError(f"--prices names {name!r}, which decides nothing here: use {', '.join(sorted(names))}")
        if not found and self.needs:
            raise UsageError(f"--criterion {self.needs} or train with --criterion {self.task_name}")
        if self.compute is not None and found:
            self.follow_compute(found)
        for kind, controller in self.controllers.items():
            steered, target = [each for each in found if each.policy.kind == kind], controller.target
            if controller.value is None:
                continue
            if not steered and self.compute is not None:
                continue
            if not steered:
                raise UsageError(f"{target.flag} steers the {kind} of a model, which this one has not: leave it out")
            most = max(map(target.most, steered))
            if target.unit and controller.value > most:
                raise UsageError(f"{target.flag} {controller.value} is impossible: the model has {most} {target.unit}")
        return found

    def follow_compute(self, found: List[Decision]):
        """Let one kind of policies follow ``--compute``: routers where any can, else halting rules, else a search.

        Raises:
            UsageError: where there is none
        """
        steered = [each.policy for each in found if each.policy.kind in self.controllers]
        if not steered:
            raise UsageError(
                f"--compute {self.compute:g} needs a policy that leaves tokens out: add --router skimming or --halting act; a "
                "tape adds to the dense model, give --target-tape"
            )
        follows = next((each.kind for each in sorted(steered, key=_order) if not each.unsteered), steered[0].kind)
        for kind, controller in self.controllers.items():
            if kind != follows:
                controller.value, controller.steers = None, False

    def forward(self, model, sample, reduce=True):
        """Return loss (a sum, to be divided by the sample size), sample size and logging output."""
        found, training = self.found(model), self.training and model.training
        for each in found:
            if each.policy.kind == "search":
                measure = getattr(self.cfg, "compute_measure", "flops")
                each.policy.measure_costs(measure, sample["net_input"]["src_tokens"])
        weighed, last = self._weighed(model)
        weighed, update = weighed and training, 0 if last is None else last.num_updates
        if weighed:
            self._check_weighed(model)
        if training:
            self._steering.advance(found, update)
        watched = model if self._teacher is None else Watched(model)
        with recording(model) as traces:
            criterion_model = ExpectedOutput(model, last, traces) if weighed else watched
            loss, size, log = self.task_criterion(criterion_model, sample, reduce)
        found = [each.ran(traces[each.name][0], training) for each in found]
        if training:
            self._steering.count(found, update)
        terms, price = self.price(found, update)
        if self._teacher is not None:
            distance = self._teacher.loss(watched, self.cfg.distill_temperature)
            log[f"{self.mark}distance"] = distance.detach() * size
            price = price + self.cfg.distill_weight * distance
        if reduce:
            loss = loss + price * size
        self.report(log, found, terms, price, loss, size)
        self._report_targets(log, found)
        return loss, size, log

    def _report_targets(self, log: Dict, found: List[Decision]):
        for name in self.valued():
            log[f"{self.mark}target_evaluated"] = float(not self.training)
            target = self.target(name)
            mine = [each for each in found if each.policy.kind == target.kind]
            if mine:
                spent, total = (sum(each) for each in zip(*map(target.spent, mine)))
                log[f"{self.mark}target_{name}_spent"], log[f"{self.mark}target_{name}_of"] = spent.detach(), total

    def price(self, found: List[Decision], update: int) -> Tuple[List[Tuple], Tensor]:
        """Return weight and price of each decision, and their sum."""
        terms = []
        for each in found:
            controller, lever = self.controllers.get(each.policy.kind), None
            if controller is not None and controller.steers:
                lever = each.policy.lever(each.trace)
            if lever is not None:
                terms.append((controller.factor, lever))
                continue
            self._check_price(each)
            options = self.options(each)
            weight = options.pop("weight", each.policy.weight) * warmed_up(update, options.pop("warmup_updates", 0))
            terms.append((weight, each.policy.price(each.trace, **options)))
        return terms, sum(weight * price for weight, price in terms)

    def report(self, log: Dict, found: List[Decision], terms: List[Tuple], price, loss, size):
        """Add sums to the logging output: a measure, and what it is divided by."""
        for each, (weight, priced) in zip(found, terms):
            measures = {"price": (weight * priced.detach() * size, size), "weight": (weight * size, size)}
            measures.update(each.policy.measures(each.trace))
            if each.macs is not None:
                measures["flops"] = each.macs
            for name, (value, of) in measures.items():
                log[f"{self.mark}sum_{each.label}_{name}"] = value
                log[f"{self.mark}of_{each.label}_{name}"] = of

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Log what the task's criterion does, and what the policies cost and did."""
        cls.task_class.reduce_metrics(logging_outputs)
        totals = {}
        for output in logging_outputs:
            for name, value in output.items():
                if cls.mark in name:
                    totals[name] = totals.get(name, 0.0) + float(value)
        if totals:
            cls.reduce_prices(totals)
            cls.reduce_targets(totals)

    @classmethod
    def reduce_targets(cls, totals: Dict[str, float]) -> None:
        """Log what was spent of the targets, and the value on target."""
        if cls.targets:
            start = f"{cls.mark}target_"
            sums = {name[len(start) :]: value for name, value in totals.items() if name.startswith(start)}
            evaluated = bool(sums.get("evaluated"))
            log_on_target(cls.wanted, cls.targets, sums, evaluated)
            for name, controller in cls.followed.items() if evaluated else ():
                if sums.get(f"{name}_of"):
                    controller.watch(sums[f"{name}_spent"], sums[f"{name}_of"])

    @classmethod
    def reduce_prices(cls, totals: Dict[str, float]) -> None:
        """Log what :meth:`report` has summed."""
        start = f"{cls.mark}sum_"
        for name in (each[len(start) :] for each in totals if each.startswith(start)):
            of = totals[f"{cls.mark}of_{name}"]
            if of:
                metrics.log_scalar(name, totals[start + name] / of, of, round=4)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        return cls.task_class.logging_outputs_can_be_summed()
