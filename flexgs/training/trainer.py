"""The two stages of training, in one loop for tests, the command line, Ray Train and Ray Tune."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from flexgs import stored
from flexgs.camera import Camera
from flexgs.config import Config, check_same_method, count_at, ratio_name
from flexgs.distributed import Group, Shard
from flexgs.distributed.gradients import summed_gradients, totals
from flexgs.errors import UserError
from flexgs.image.losses import as_float, halved, photometric
from flexgs.inputs import Layout, typed
from flexgs.model.deltas import Deltas
from flexgs.model.elastic import ElasticModel, Place, make_transform, transform_kind
from flexgs.model.importance import footprint, score, scorer
from flexgs.model.order import make_order
from flexgs.model.push import alive_at
from flexgs.model.selection import Selection
from flexgs.model.transform import Transform
from flexgs.raster import project, rasterize
from flexgs.raster.contract import Projection, RasterConfig
from flexgs.scene import Points, Scene, View, ViewSampler, initial_splats
from flexgs.scene.identity import OTHER_OUTPUT, check_same_capture
from flexgs.scene.shared_images import share_images
from flexgs.scene.views import AHEAD
from flexgs.seeds import generator
from flexgs.splats import Splats
from flexgs.stored import SPLATS, splats_of
from flexgs.training.average import EVERY, Average
from flexgs.training.checkpoint import STATE, Checkpoint, DamagedError
from flexgs.training.densify import Densifier, crosses, reorder
from flexgs.training.mcmc import Mcmc
from flexgs.training.natural_selection import PLACES, NaturalSelection
from flexgs.training.optim import Optimizer, splat_groups

Report = Callable[[int, dict[str, Any]], None]
"""Called with the step and the metrics of a progress line."""
Keep = Callable[[int, Callable[[Path], None]], None]
"""Called with the step and a function that writes a checkpoint into a folder."""


WATCHED = (0.01, 0.05, 0.15, 1.0)
"""Ratios of the cuts whose quality is shown while training; before stage 2, the whole only."""
WATCHED_VIEWS = 3
"""The most test views that are rendered for it."""


class Cut(NamedTuple):
    """What one elastic render of one view needs of this worker's Gaussians."""

    leaf: Splats
    """The kept rows as leaf tensors, whose gradient is as small as the cut."""
    ratio: float
    camera: Camera
    selection: Selection
    projection: Projection


class NonFiniteLossError(UserError):
    """Raised when the loss or a gradient is NaN or infinite."""


class Trainer:
    """Trains one scene: stage 1 up to `base_steps`, stage 2 up to `config.steps`.

    `step` counts training views, not optimizer steps. With a base (the Gaussians of config.base.ply) there is
    no stage 1, and stage 2 trains only what makes the base elastic.
    """

    def __init__(self, config: Config, scene: Scene, group: Group | None = None,
                 device: torch.device | str = "cpu", base: Splats | None = None):
        assert (base is None) == (config.base.ply is None), "the caller reads config.base.ply"
        self.config, self.scene, self.group = config, scene, group or Group()
        self.device = torch.device(device)
        self.batch = config.batch
        if self.batch % self.group.world:
            raise UserError(f"--batch: found {self.batch}, expected a multiple of the "
                            f"{self.group.world} workers")
        self.step, self.base_steps, self.seconds, self.unit = 0, config.base_steps, 0.0, scene.unit
        self.sampler = ViewSampler(len(scene.train), config.seed)
        share_images(scene, self.group)
        self.background = torch.tensor(config.background, device=self.device)
        self.raster, self.frozen = RasterConfig(antialiased=config.antialiased), base is not None
        first = base.at(scene.origin) if base else self._initial_splats()
        self.shard = self._shard(len(first))
        self.splats = first.map(self.shard.mine).to(self.device).requires_grad_(not self.frozen)
        """The Gaussians that this worker holds: all of them, or its shard."""
        self.optimizer = Optimizer(splat_groups(self.splats, config.lr, scene.scene_scale, unit=self.unit),
                                   self.batch)
        densifier = Mcmc if config.base.densify == "mcmc" else Densifier
        self.densifier = densifier(config.base, self.base_steps, scene.scene_scale, config.seed,
                                   len(self.splats), self.device)
        scorer(config.order.score), transform_kind(config)  # refuse unknown names before stage 1
        self.order = make_order(config)
        self.transform: Transform = Transform()
        self.counts: Sequence[int] = ()
        """The counts of the transform of all Gaussians; that of a shard has fewer."""
        self.average = Average()
        self.selection: NaturalSelection | None = None
        self.elastic = False
        """Whether stage 2 has begun: Gaussians are in order, and order and transform have parameters."""
        self._meter = Meter()
        self._speed, self._estimated_at = 0.0, 0
        self._ahead = ThreadPoolExecutor(AHEAD, "prefetch")

    def _initial_splats(self) -> Splats:
        """Make a Gaussian for each point of the capture, or of a random subset of max_splats points."""
        points, base = self.scene.points, self.config.base
        if len(points.xyz) > base.max_splats:
            order = torch.randperm(len(points.xyz), generator=generator(self.config.seed, "points"))
            chosen = order[:base.max_splats]
            points = Points(points.xyz[chosen], points.rgb[chosen])
        return initial_splats(points, base.sh_degree, opacity=base.init_opa, size=base.init_scale,
                              alone=self.scene.scene_scale / 5, origin=self.scene.origin)

    def _shard(self, n: int) -> Shard:
        """Divide n Gaussians among the workers, if config says so."""
        return Shard(self.group, n, self.config.distributed.mode == "sharded")

    @property
    def stage(self) -> int:
        """The stage, 1 or 2, of the next step."""
        return 1 if self.step < self.base_steps else 2

    @property
    def turn(self) -> int:
        """The number of the optimizer step that is done now.

        It decides which renders each view of the step has, and the ratios of the two costliest: all views
        cost about the same, so that no worker waits for another.
        """
        return self.step // self.batch

    @property
    def evaluated_now(self) -> bool:
        """Whether the cuts are to be measured after the step that was just done."""
        every = self.config.eval_every
        return bool(every) and crosses(self.step - self.batch, self.step, every)

    # ------------------------------------------------------------------ the loop

    def fit(self, report: Report, keep: Keep, until: int | None = None,
            stop: Callable[[bool], bool] = lambda reported: False) -> None:
        """Train to the end of config.steps, or earlier.

        Args:
            report: called as report(step, metrics) every config.report_every and every config.eval_every
                views, and at the end.
            keep: called as keep(step, write) every config.checkpoint_every views, at a report
                config.checkpoint_seconds after the last time, and at the end.
            until: number of views to stop at instead.
            stop: asked after each step as stop(whether the step was reported); True ends the training.

        Raises:
            UserError: the checkpoint has already seen more than config.steps views.
            NonFiniteLossError: the loss or a gradient is NaN or infinite.
        """
        c = self.config
        if self.step >= c.steps + self.batch:  # the last batch may reach a little beyond
            raise UserError(f"--steps {c.steps}: the checkpoint has already seen {self.step} views; "
                            "ask for at least that many or choose another output folder")
        end = c.steps if until is None else until
        self._meter.restart()  # does not count the time of loading
        self._estimated_at = self.step
        done, kept = self.step >= end, time.monotonic()
        while not done:
            before, start = self.step, time.perf_counter()
            self.train_step()
            self.seconds += time.perf_counter() - start
            done = self.step >= end
            if crosses(before, self.step, c.check_every) or done:
                self.group.check_equal(((name, t) for name, t in self._tensors().items()
                                        if not self._counts(name)), self.step)
            if reported := crosses(before, self.step, c.report_every) or self.evaluated_now or done:
                report(self.step, self.metrics())
            done = stop(reported) or done
            # By the clock of the first worker, since all have to agree.
            due = reported and self.group.gather(time.monotonic() - kept > c.checkpoint_seconds)[0]
            if crosses(before, self.step, c.checkpoint_every) or due or done:
                keep(self.step, self.snapshot())
                kept = time.monotonic()

    def train_step(self) -> None:
        """Do one optimizer step, with the gradient averaged over `batch` views of all workers."""
        before = self.step
        if self.stage == 2 and not self.elastic:
            self._begin_stage_2()
        elif self.elastic:
            every = self.order.refresh_every
            if every and crosses(before - self.batch, before, every):
                self.order.refresh(self._scores())
        total: list[Tensor] = []
        for slot in self.group.my_indices(self.batch):
            loss = self._view_loss(before + slot)
            view = [loss, *self.optimizer.take_gradients()]
            # Add whole gradients of views, so that one worker with two views rounds as two workers do.
            total = [a.add_(b) for a, b in zip(total, view, strict=True)] if total else view
        names = [name for name, _ in self.optimizer.parameters()]
        gradients = dict(zip(["loss", *names], total, strict=True))
        # Those of a shard are complete; the other workers learn only whether they are finite.
        own = {name: gradients[name] for name in names if self._counts(name)}
        sums = summed_gradients(gradients | {name: g.sum() for name, g in own.items()}, self.group,
                                self.config.distributed)
        read = totals(sums)
        # All workers have the same sums, so all of them stop here together.
        if bad := next((name for name, value in read.items() if not math.isfinite(value)), None):
            what = f"the loss is {read['loss']}" if bad == "loss" else f"the gradient of {bad} is not finite"
            raise NonFiniteLossError(f"scene {self.scene.name}, step {before}: {what}; the last "
                                     "checkpoint is kept; lower the learning rates (--lr) and run again")
        self._meter.add(read["loss"], self.batch)
        self.optimizer.step([(sums | own)[name] for name in names], self._progress(before))
        grow = self.stage == 1
        self.step = before + self.batch
        if grow:
            self.splats = self.densifier.refine(self.splats, self.optimizer, before, self.step, self.shard)
        elif (rows := self.order.survivors(self.splats, self._progress(before),
                                           self._progress(self.step))) is not None:
            self.splats = reorder(self.splats, self.optimizer, rows, self.shard)
        elif self.selection:
            self._select_naturally(self.selection)
        elif 1 - self._progress(self.step) >= self.config.average:
            self.average = Average()
        elif crosses(before, self.step, EVERY):
            self.average.add(self.optimizer.parameters())
        if self.step >= self.config.steps:
            self.average.apply(self.optimizer.parameters())

    # ------------------------------------------------------------------ one view

    def _view_loss(self, position: int) -> Tensor:
        """Back-propagate and return the loss of the position-th training view, divided by the batch."""
        # Decode some of this worker's next views while these are rendered.
        after, own = position + AHEAD * self.group.world, range(self.config.ratios.renders * (self.stage - 1))
        for place in sorted({after, *(self._place(after, i) for i in own)}):
            self._ahead.submit(self.scene.train[self.sampler[place]].prefetch)
        camera, target, mask = photograph = self._photograph(position)
        weights, cameras = self.config.loss, {p: self._camera(p) for p in self._together(position)}
        if self.stage == 1:
            seen = [project(self.splats, at, sh_degree=self._sh_degree(p), config=self.raster)
                    for p, at in cameras.items()]
            for projection in seen:
                projection.means2d.retain_grad()
            loss = photometric(self._rasterize(seen, camera), target, l1=self.config.base.l1,
                               ssim=self.config.base.ssim, mask=mask)
            loss = (loss + self.densifier.regulariser(self.splats)) / self.batch
            loss.backward()
            for projection, at in zip(seen, cameras.values(), strict=True):
                self.densifier.observe(projection, at, self.batch)
            return loss.detach()
        total, ratios = torch.zeros((), device=self.device), self.config.ratios
        whole = not self.frozen and not (ratios.alternate and self.turn % 2)
        models = {"full": self.splats} if whole else {}
        models |= {"selection": self.selection.splats} if self.selection else {}
        for name, splats in models.items():
            seen = [project(splats, at, config=self.raster) for at in cameras.values()]
            loss = photometric(self._rasterize(seen, camera), target, l1=weights.full_l1,
                               ssim=weights.full_ssim, mask=mask) / self.batch
            loss.backward()
            total += loss.detach()
            self._meter.note(name, loss)
        cuts = [*range(ratios.renders - (whole and ratios.alternate))]
        if ratios.rare and self.turn % ratios.upper_every == 0:
            cuts += range(ratios.renders, ratios.renders + len(ratios.rare))
        ranges, selection = [*ratios.bands, *ratios.rare], self.config.selection
        for i in cuts:
            if self.selection and selection and ranges and ranges[i][1] <= selection[0]:
                continue  # these cuts begin with what the selection leaves
            place = self._place(position, i)
            of = photograph if place == position else self._photograph(place)
            total += self._elastic_loss(position, i, *of, 1 / (self.batch * ratios.kinds))
        return total

    def _together(self, position: int) -> range:
        """Return the positions of the views that the workers render from each other's shards, by rank.

        Where every worker has all Gaussians that is its own view alone.
        """
        first = position - self.shard.owners.rank
        return range(first, first + self.shard.owners.world)

    def _rasterize(self, projections: Sequence[Projection], camera: Camera) -> Tensor:
        """Return this worker's image, from its Gaussians as the views that are rendered together see them."""
        return rasterize(self.shard.exchanged(projections), camera, background=self.background,
                         config=self.raster).image

    def _place(self, position: int, i: int) -> int:
        """Return the position of the view that a view's i-th elastic render is of.

        The second cut of a band is of the view half an epoch later.
        """
        bands = self.config.ratios.bands
        again = bands[:i].count(bands[i]) if i < len(bands) else 0
        return position + again * (len(self.scene.train) // 2)

    def _camera(self, position: int) -> Camera:
        return self.scene.train[self.sampler[position]].camera.to(self.device)

    def _photograph(self, position: int) -> tuple[Camera, Tensor, Tensor | None]:
        """Return the camera, the image [H, W, 3] in [0, 1] and the mask of the position-th training view."""
        view = self.scene.train[self.sampler[position]]
        mask = view.mask()
        return (view.camera.to(self.device), as_float(view.image().to(self.device), torch.float32),
                None if mask is None else mask.to(self.device))

    def _elastic_loss(self, position: int, i: int, camera: Camera, target: Tensor, mask: Tensor | None,
                      weight: float) -> Tensor:
        """Back-propagate and return the loss of a view's i-th elastic render, of kept Gaussians only."""
        cuts = [self._cut(p, i) for p in self._together(position)]
        mine = cuts[self.shard.owners.rank]
        if mine.camera.width < camera.width:
            camera, target, mask = halved(camera, target, mask)
        image = self._rasterize([cut.projection for cut in cuts], camera)
        loss = photometric(image, target, l1=self.config.loss.elastic_l1,
                           ssim=self.config.loss.elastic_ssim, mask=mask)
        terms = {"transform": self.transform.regulariser(), **mine.selection.losses}
        for name, term in {"elastic": loss, **terms}.items():
            if isinstance(term, Tensor):
                self._meter.note(name, weight * term)
        loss = weight * (loss + terms["transform"] + sum(mine.selection.losses.values()))
        loss.backward()
        if not self.frozen:
            for cut in cuts:
                self._add_gradient(cut.selection.index, cut.leaf, cut.ratio**self.config.loss.elastic_fade)
        return loss.detach()

    def _cut(self, position: int, i: int) -> Cut:
        """Project what a view's i-th elastic render keeps of this worker's Gaussians."""
        ratio = self._ratio(self.turn if i >= self.config.ratios.renders - 2 else position, i)
        camera, sparse = self._camera(self._place(position, i)), self.config.ratios.half_above
        if sparse is not None and camera.width * camera.height > sparse * count_at(ratio, self.shard.n):
            camera = camera.scaled(camera.width // 2, camera.height // 2)
        selection = self._select(ratio, position, i)
        leaf = self.splats[selection.index].detach().requires_grad_(not self.frozen)
        index = selection.index if isinstance(selection.index, Tensor) else None
        projection = project(self.transform(leaf, ratio, index), camera, mask=selection.mask,
                             config=self.raster)
        return Cut(leaf, ratio, camera, selection, projection)

    def _select(self, ratio: float, position: int, i: int) -> Selection:
        """Return which of this worker's Gaussians a view's i-th elastic render keeps."""
        if self.shard.owners.world > 1:  # the order is fixed: see Config.check
            return Selection(slice(0, self.shard.count(count_at(ratio, self.shard.n))))
        return self.order.select(self.splats, ratio, self._progress(position), (position, i))

    def _add_gradient(self, index: slice | Tensor, leaf: Splats, factor: float) -> None:
        """Add the gradient of the rows at `index`, times a factor, to that of all Gaussians."""
        for (_, whole), (_, part) in zip(self.splats.items(), leaf.items(), strict=True):
            if part.grad is None:
                continue
            if whole.grad is None:
                whole.grad = torch.zeros_like(whole)
            if isinstance(index, slice):
                whole.grad[index].add_(part.grad, alpha=factor)
            else:
                whole.grad.index_add_(0, index, part.grad, alpha=factor)

    def _ratio(self, turn: int, i: int) -> float:
        """Return the turn-th ratio of the i-th elastic render.

        As many in turn as a step has views share the band among them, a stratum each in random order, so that
        no part of it is left out for long where all views of a step have one ratio.
        """
        r = self.config.ratios
        if r.sampling == "round_robin":
            return r.values[turn % len(r.values)]
        u = float(torch.rand((), generator=generator(self.config.seed, "ratio", turn, i),
                             dtype=torch.float64))
        strata = torch.randperm(self.batch, generator=generator(self.config.seed, "strata",
                                                                turn // self.batch, i))
        u = (int(strata[turn % self.batch]) + u) / self.batch
        if r.sampling == "random":
            return r.values[int(u * len(r.values))]
        low, high = [*r.bands, *r.rare][i]
        within = [value for value in r.values if low <= value <= high]
        if r.named and within:
            pick = torch.rand(2, generator=generator(self.config.seed, "named", turn, i))
            if float(pick[0]) < r.named:
                return within[int(float(pick[1]) * len(within))]
        return low + (high - low) * u if r.sampling == "uniform" else low * (high / low) ** u

    def _sh_degree(self, position: int) -> int:
        """Return the active degree: one more every 15th of stage 1 (3DGS: every 1000 of 15,000 steps)."""
        return min(self.config.base.sh_degree, int(15 * position / self.base_steps))

    def _progress(self, position: int) -> float:
        """Return how far a view is through its stage, 0 to 1."""
        if position < self.base_steps:
            return position / self.base_steps
        return (position - self.base_steps) / max(1, self.config.steps - self.base_steps)

    # ------------------------------------------------------------------ stage 2

    def _begin_stage_2(self) -> None:
        """Sort the Gaussians, and make the parameters of the order and the transform.

        For this, and when the model is made, every worker has all Gaussians for a moment.
        """
        whole, scores = self._whole(), self._scores()
        if begin := self.order.begin(whole, scores):
            rows, whole = begin  # which are those in these rows, unless the order merges
            self.splats, scores = reorder(self.splats, self.optimizer, rows, self.shard), scores[rows]
            for (_, mine), (_, new) in zip(self.splats.items(), whole.items(), strict=True):
                mine.data.copy_(self.shard.mine(new))
        self._make_stage_2(whole)
        self.order.refresh(scores)
        self.transform.start(whole, scores)
        self._divide_stage_2()
        if selection := self.config.selection:
            self._begin_selection(selection[0])

    def _whole(self) -> Splats:
        """Return the Gaussians of all workers, without gradients."""
        return self.splats.detach().map(self.shard.whole)

    def _scores(self) -> Tensor:
        return score(self.config.order.score, self._whole(), self.scene.train, self.group)

    def _make_stage_2(self, whole: Splats) -> None:
        """Make the transform and the order of stage 2 for these, which are all Gaussians."""
        with torch.random.fork_rng(devices=[]):  # layers draw from the global generator
            torch.manual_seed(self.config.seed)
            self.transform = make_transform(self.config, whole, self.scene.points.xyz,
                                            self.unit).to(self.device)
            self.order.build(whole, self.unit)
            self.order.to(self.device)

    def _divide_stage_2(self) -> None:
        """Keep this worker's share of the transform, and make the optimizer of stage 2."""
        self.counts = self.transform.counts
        self.transform = self._resized(self.shard.mine, [self.shard.count(k) for k in self.counts])
        moments = self.optimizer.moments()
        groups = splat_groups(self.splats, self.config.lr, self.scene.scene_scale, self.config.lr.shN_factor,
                              self.unit)
        first, last = self.config.lr.stage2
        groups = [{**g, "lr": g["lr"] * first, "decay": g["decay"] * last / first} for g in groups]
        groups += self.transform.groups(self.config, self.scene.scene_scale)
        groups += self.order.groups(self.config)
        self.optimizer = Optimizer(groups, self.batch)
        if not self.config.lr.restart:
            self.optimizer.load_moments(moments)
        self.elastic = True

    @torch.no_grad()
    def _begin_selection(self, ratio: float) -> None:
        """Begin the natural selection with the cut at a ratio and the Adam moments of its Gaussians."""
        count = count_at(ratio, self.shard.n)
        first = slice(0, self.shard.count(count))
        cut = self.transform(self.splats.detach()[first], ratio)
        moments = {name.replace("splats.", "selection."): t if name.endswith("/step") else t[first]
                   for name, t in self.optimizer.moments().items() if name.startswith("splats.")}
        self._set_selection(cut, torch.arange(count, device=self.device), self._shard(count))
        self.optimizer.load_moments(moments)

    def _set_selection(self, splats: Splats, places: Tensor, shard: Shard) -> None:
        """Train this worker's share of the Gaussians of a selection, too."""
        self.selection = NaturalSelection(splats, places.to(self.device), shard)
        self.optimizer.groups += self.selection.groups(self.config.lr, self.scene.scene_scale, self.unit)

    def _select_naturally(self, selection: NaturalSelection) -> None:
        """Go on with the natural selection; what is left at a knot starts that knot and all below."""
        assert self.config.selection
        high, low = self.config.selection
        first, last = (count_at(ratio, self.shard.n) for ratio in (high, low))
        alive = alive_at(first, last, self._progress(self.step) / self.config.order.push)
        for ratio in sorted({*self.config.deltas.knots, low}, reverse=True):
            count = count_at(ratio, self.shard.n)
            if max(alive, last) <= count < selection.shard.n:
                selection.thin(count, self.optimizer)
                self._start_knots(selection)
        selection.thin(alive, self.optimizer)
        if selection.shard.n == last:
            self.selection = None
            self.optimizer.drop("selection.")

    @torch.no_grad()
    def _start_knots(self, selection: NaturalSelection) -> None:
        """Put what a selection has left first in the order, and start its knot and all below from it."""
        left = selection.splats.detach().map(selection.shard.whole)
        scores = score(self.config.order.score, left, self.scene.train, self.group)
        by_tree = self.order.permutation(left, scores)
        before = selection.renumber(by_tree, self.optimizer)
        rest = torch.arange(len(before), self.shard.n, device=self.device)
        self.splats = reorder(self.splats, self.optimizer, torch.cat([before, rest]), self.shard)
        whole = self._resized(self.shard.whole, self.counts)
        assert isinstance(whole, Deltas)
        rows = whole.moved(before)
        for parameter in whole.parameters():
            parameter.copy_(parameter[rows])
        whole.restart(self._whole(), left[by_tree], scores[by_tree])
        for mine, stored_rows in zip(self.transform.parameters(), whole.parameters(), strict=True):
            mine.copy_(self.shard.mine(stored_rows, self.counts))
            self.optimizer.state.pop(mine, None)  # Adam counts steps of whole tensors: it starts anew

    def model(self) -> ElasticModel:
        """Return the elastic model, in its final order; the first call begins stage 2 if nothing else has."""
        if not self.elastic:
            self._begin_stage_2()
        return self.model_so_far()

    def model_so_far(self) -> ElasticModel:
        """Return the model as trained so far, without changing anything; before stage 2 it has no order.

        Where workers hold shards, all of them call this together.
        """
        splats, transform = self._whole(), self._resized(self.shard.whole, self.counts)
        final = self.order.final(splats, self._scores) if self.elastic else None
        splats = splats if final is None else splats[final]
        return ElasticModel(splats, transform.stored(), self.config,
                            [view.camera for view in self.scene.train], self.scene.digest)

    # ------------------------------------------------------------------ state

    def metrics(self) -> dict[str, Any]:
        """Return the figures of a progress line; losses and views per second are since the last call.

        In stage 2, loss is the sum of loss_full, loss_selection, loss_elastic, loss_transform and those of
        the order, each with its weight. All workers call this together.
        """
        loss, mine, rate = self._meter.read()
        terms = {f"loss_{name}": round(value, 6) for name, value in self._added_up(mine).items()}
        eta = self._seconds_left(rate)
        return {"stage": 1 if self.step <= self.base_steps else 2, "steps": self.config.steps, "loss": loss,
                **terms, **(self.order.figures(self._progress(self.step)) if self.elastic else {}),
                "views_per_second": rate, "eta_seconds": eta, "workers": self.group.world,
                "splats": self.shard.n, "memory_mb": self._memory(),
                **{f"test_psnr_{ratio_name(ratio)}": psnr for ratio, psnr in self._test_psnr().items()}}

    def _added_up(self, terms: Mapping[str, float]) -> dict[str, float]:
        """Return the sum over the workers of each term."""
        total: dict[str, float] = {}
        for part in self.group.gather(terms):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def _seconds_left(self, rate: float) -> float:
        """Estimate the time that is left, NaN if unknown; rate: views per second since the last estimate.

        A view of stage 2 counts as config.ratios.cost views of stage 1. The speed is averaged over estimates,
        so that the time does not jump.
        """
        def work(step: int) -> float:
            return step + (self.config.ratios.cost - 1) * max(0, step - self.base_steps)

        views = self.step - self._estimated_at
        if views > 0 and rate:
            speed = rate * (work(self.step) - work(self._estimated_at)) / views
            self._speed = (self._speed + speed) / 2 if self._speed else speed
        self._estimated_at = self.step
        return (work(self.config.steps) - work(self.step)) / self._speed if self._speed else math.nan

    @torch.no_grad()
    def _test_psnr(self) -> dict[float, float]:
        """Return the mean PSNR in dB of cuts on a few test views, by ratio; nothing learns from it."""
        test = self.scene.test
        n = min(WATCHED_VIEWS, len(test))
        views, found = [test[(2 * i + 1) * len(test) // (2 * n)] for i in range(n)], {}
        for ratio in WATCHED if self.elastic else (1.0,):
            splats = self.cut(ratio)
            if values := [self._psnr(splats, view) for view in views]:
                found[ratio] = round(statistics.fmean(values), 3)
        return found

    def _psnr(self, splats: Splats, view: View) -> float:
        """Return the PSNR in dB of a view; pixels outside its mask count as perfect, as in evaluate.py."""
        camera = view.camera.to(self.device)
        projection = project(splats, camera, config=self.raster)
        image = self._rasterize([projection] * self.shard.owners.world, camera).clamp(0, 1)
        target, mask = view.image().to(self.device) / 255, view.mask()
        if mask is not None:
            image = torch.where(mask.to(self.device)[:, :, None], image, target)
        # torchmetrics, which evaluate.py uses, takes seconds to import
        return float(-10 * torch.log10((image - target).square().mean().clamp(min=1e-12)))

    @torch.no_grad()
    def cut(self, ratio: float) -> Splats:
        """Return a cut of the model as trained so far, or this worker's share, without changing anything.

        Before stage 2 has put the Gaussians in order, those of the largest footprint stay.
        """
        splats, count = self.splats.detach(), count_at(ratio, self.shard.n)
        if count == self.shard.n:
            return splats
        if not self.elastic:
            return splats[footprint(splats, [], self.group).argsort(descending=True, stable=True)[:count]]
        chosen = self._select(ratio, self.step, len(WATCHED))
        index = chosen.index if isinstance(chosen.index, Tensor) else None
        return self.transform(splats[chosen.index], ratio, index).detach()

    def _memory(self) -> float:
        cuda = self.device.type == "cuda"
        return round((torch.cuda.max_memory_allocated(self.device) if cuda
                      else psutil.Process().memory_info().rss) / 1e6, 1)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"splats.{name}": t for name, t in self.splats.items()}
        if self.elastic:
            tensors |= {f"transform.{name}": t for name, t in self.transform.state_dict().items()}
            tensors |= self.order.state_dict()
        if self.selection:
            tensors |= self.selection.tensors()
        return tensors

    def _counts(self, name: str) -> Sequence[int]:
        """Return how many rows the blocks of a checkpoint's tensor have for all Gaussians together.

        None if this worker has the whole of it.
        """
        name = name.removeprefix("adam.").removeprefix("average.")
        if self.shard.owners.world == 1 or name.endswith("/step"):
            return ()
        if name.startswith(("splats.", "densify.")):
            return [self.shard.n]
        if self.selection and name.startswith("selection."):
            return [self.selection.shard.n]
        return self.counts if name.startswith("transform.") else ()

    def _resized(self, part: Callable[[Tensor, Sequence[int]], Tensor], counts: Sequence[int]) -> Transform:
        """Return a transform of part(parameter, counts of all Gaussians), which has these counts."""
        if self.shard.owners.world == 1:
            return self.transform
        other = copy.deepcopy(self.transform)
        for parameter in other.parameters():
            parameter.data = part(parameter.data, self.counts)
        other.counts = counts
        return other

    def snapshot(self) -> Callable[[Path], None]:
        """Return a function that writes a checkpoint into a folder: all that the next step depends on.

        All workers call this together; the first one's function is the one to call.
        """
        tensors = {**self._tensors(), **{f"adam.{k}": t for k, t in self.optimizer.moments().items()}}
        tensors |= {f"average.{name}": t for name, t in self.average.tensors().items()}
        if self.stage == 1:
            seen = self.densifier.tensors()
            tensors |= zip(seen, self.shard.replicas.summed(list(seen.values())), strict=True)
        kept = {}
        for name, t in tensors.items():
            whole = self.shard.whole(t.detach(), self._counts(name))
            if self.group.rank == 0:
                kept[name] = whole.cpu()
        about = {"scene": self.scene.name, "capture": self.scene.digest, "step": self.step,
                 "base_steps": self.base_steps, "elastic": self.elastic,
                 **Place(self.splats.origin, self.unit).to_dict(),
                 "seconds": self.seconds, "config": self.config.to_dict(), "losses": self._meter.losses,
                 "terms": self._added_up({name: float(t) for name, t in self._meter.terms.items()})}
        return lambda folder: stored.save(folder, STATE, kept, about)

    def save(self, folder: Path) -> None:
        """Write a checkpoint into an existing folder, where there is one worker."""
        self.snapshot()(folder)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint; an error leaves the trainer as it was.

        Numbers of views, evaluation and reporting may differ from those of the checkpoint.

        Raises:
            UserError: the checkpoint is of another method or another capture.
            DamagedError: the checkpoint is not whole.
        """
        checkpoint = Checkpoint(folder)
        about = checkpoint.about
        if about["scene"] != self.scene.name:
            raise UserError(f"{folder}: found scene {about['scene']}, expected {self.scene.name}; choose "
                            "another output folder")
        check_same_method(checkpoint.config, self.config, about["elastic"], folder)
        check_same_capture(about.get("capture"), self.scene.digest, folder, OTHER_OUTPUT)
        try:
            read = checkpoint.tensors(self._layout(checkpoint))
            losses = typed(list[float], about.get("losses", []), f"{folder}/state.json: losses")
            terms = typed(dict[str, float], about.get("terms", {}), f"{folder}/state.json: terms")
        except UserError as e:
            raise DamagedError(str(e)) from None
        self.step, self.seconds = about["step"], about["seconds"]
        if self.step >= about["base_steps"]:  # stage 1 is over: raising --steps lengthens stage 2 only
            self.base_steps = about["base_steps"]
        self._meter.losses = losses
        if self.group.rank == 0:
            self._meter.terms = {name: torch.tensor(value) for name, value in terms.items()}
        place = Place.of(about, f"{folder}/state.json")
        self.unit = place.unit
        whole = Splats(**stored.part(read, "splats."), origin=place.origin).at(self.scene.origin)
        self.shard.n = len(whole)
        self.splats = whole.map(self.shard.mine).to(self.device).requires_grad_(not self.frozen)
        self.optimizer = Optimizer(splat_groups(self.splats, self.config.lr, self.scene.scene_scale,
                                                unit=self.unit), self.batch)
        if about["elastic"]:
            self._make_stage_2(whole)
            self.transform.load_state_dict(stored.part(read, "transform."))
            self.order.load_state_dict({name: read[name] for name in self.order.state_dict()})
            self._divide_stage_2()
            if PLACES in read:
                alive = Splats(**stored.part(read, "selection."), origin=place.origin).at(self.scene.origin)
                shard = self._shard(len(alive))
                self._set_selection(alive.map(shard.mine).to(self.device), read[PLACES], shard)
        tensors = {name: self.shard.mine(t, self._counts(name)).to(self.device) for name, t in read.items()}
        self.optimizer.load_moments(stored.part(tensors, "adam."))
        self.average.load(stored.part(tensors, "average."))
        if self.stage == 1:
            self.densifier.load(tensors, self.shard)

    def _layout(self, checkpoint: Checkpoint) -> Layout:
        """Return the names, types and shapes of the tensors that a checkpoint of this method has."""
        heads = checkpoint.heads
        numbers = {} if self.frozen else {"harmonics": (self.config.base.sh_degree + 1) ** 2 - 1}
        splats, layout = splats_of(heads, str(checkpoint.file), "splats.", **numbers), dict(SPLATS)
        groups = [] if self.frozen else splat_groups(splats.requires_grad_(), self.config.lr, 1.0)
        if checkpoint.about["elastic"]:
            with torch.device("meta"):  # shapes only, without memory
                transform = make_transform(self.config, splats.detach())
                layout |= stored.layout_of(transform, "transform.")
                groups += transform.groups(self.config, 1.0)
                order = make_order(self.config)
                order.build(splats.detach())
                layout |= stored.layout_of(order, "")
                groups += order.groups(self.config)
            if PLACES in heads:
                alive = splats_of(heads, str(checkpoint.file), "selection.",
                                  harmonics=splats.shN.shape[1])
                layout |= {f"selection.{name}": ("float32", tuple(t.shape)) for name, t in alive.items()}
                layout |= {PLACES: ("int64", tuple(heads[PLACES].shape))}
                groups += NaturalSelection(alive, heads[PLACES], Shard()).groups(self.config.lr, 1.0, 1.0)
        averaged = "average.count" in heads
        layout |= {"average.count": ("float32", ())} if averaged else {}
        for name, parameter in Optimizer(groups, self.batch).parameters():
            if averaged:
                layout |= {f"average.{name}": ("float32", tuple(parameter.shape))}
            if f"adam.{name}/step" in heads:  # has been trained
                layout |= {f"adam.{name}/step": ("float32", ()),
                           f"adam.{name}/exp_avg": ("float32", tuple(parameter.shape)),
                           f"adam.{name}/exp_avg_sq": ("float32", tuple(parameter.shape))}
        if checkpoint.about["step"] < checkpoint.about["base_steps"]:
            layout |= self.densifier.layout()
        return layout


class Meter:
    """Measures the mean losses and the views per second between two readings."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        """The losses of the steps since the last reading, which a checkpoint keeps."""
        self.terms: dict[str, Tensor] = {}
        """The sum over these steps of each term of the loss of this worker's views, kept for all workers."""
        self.views, self.start = 0, time.perf_counter()

    def add(self, loss: float, views: int) -> None:
        """Count the loss of one step and its number of views."""
        self.losses.append(loss)
        self.views += views

    def note(self, name: str, term: Tensor) -> None:
        """Count a term of the loss of this worker's views; a GPU is not waited for before read()."""
        self.terms[name] = self.terms.get(name, 0.0) + term.detach()

    def restart(self) -> None:
        """Measure the views per second from now on; losses that a checkpoint has brought stay."""
        self.views, self.start = 0, time.perf_counter()

    def read(self) -> tuple[float, dict[str, float], float]:
        """Return the mean loss, the mean of each term, and views per second since the last reading."""
        steps = max(1, len(self.losses))
        terms = {name: float(term) / steps for name, term in self.terms.items()}
        loss, rate = sum(self.losses) / steps, self.views / max(1e-9, time.perf_counter() - self.start)
        self.losses, self.terms = [], {}
        self.restart()
        return round(loss, 6), terms, round(rate, 2)
