"""The mutants: a file, a text that it has exactly once, what takes its place, and the tests that should notice."""

import re
from typing import NamedTuple


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    """A text of the file; white space in it stands for any white space, so that lines may be wrapped anew."""
    new: str
    tests: tuple[str, ...]

    def change(self, text: str) -> tuple[str, int]:
        """The text of the file with new in place of old, and how often old was found."""
        pattern = r"\s+".join(re.escape(word) for word in re.split(r"\s+", self.old))
        return re.subn(pattern, lambda _: self.new, text)


def _of(file: str, tests: str, *changes: tuple[str, str, str]) -> list[Mutant]:
    """Mutants of one file: (name, old, new), and the words of the test files' names."""
    paths = tuple(f"tests/test_{word}.py" for word in tests.split())
    return [Mutant(name, file, old, new, paths) for name, old, new in changes]


TRAINER = "flexgs/training/trainer.py"
CONFIG = "flexgs/config.py"

MUTANTS = [
    # a term of the loss or its weight
    *_of(TRAINER, "steps",
         ("elastic loss not divided by its renders", "1 / (self.batch * ratios.kinds))", "1 / self.batch)"),
         ("elastic loss not divided by the batch", "1 / (self.batch * ratios.kinds))", "1 / ratios.kinds)"),
         ("fade ignored", "ratio**self.config.loss.elastic_fade", "1.0"),
         ("fade of the other sign", "ratio**self.config.loss.elastic_fade", "ratio**-self.config.loss.elastic_fade"),
         ("regulariser left out", '(loss + terms["transform"] +', "(loss +"),
         ("selector's losses left out", " + sum(mine.selection.losses.values()))", ")"),
         ("whole with the weights of the cuts", "l1=weights.full_l1, ssim=weights.full_ssim",
          "l1=weights.elastic_l1, ssim=weights.elastic_ssim"),
         ("L1 and SSIM of the cuts swapped", "l1=self.config.loss.elastic_l1, ssim=self.config.loss.elastic_ssim",
          "l1=self.config.loss.elastic_ssim, ssim=self.config.loss.elastic_l1"),
         ("L1 and SSIM of stage 1 swapped", "l1=self.config.base.l1, ssim=self.config.base.ssim",
          "l1=self.config.base.ssim, ssim=self.config.base.l1"),
         ("gradient of a slice without its factor", "whole.grad[index].add_(part.grad, alpha=factor)",
          "whole.grad[index].add_(part.grad)"),
         ("gradient of an index replaces", "whole.grad.index_add_(0, index, part.grad, alpha=factor)",
          "whole.grad.index_copy_(0, index, part.grad)"),
         ("the whole at odd steps", "ratios.alternate and self.turn % 2)", "ratios.alternate and (self.turn + 1) % 2)"),
         ("the last band twice", "range(ratios.renders - (whole and ratios.alternate))", "range(ratios.renders)"),
         ("upper cut at other steps", "self.turn % ratios.upper_every == 0", "self.turn % ratios.upper_every == 1"),
         ("never half the size", "if sparse is not None and", "if False and"),
         ("half the size by half the threshold", "> sparse * count_at", "> 2 * sparse * count_at")),
    *_of("flexgs/model/deltas.py", "steps", ("backward of the deltas without weight",
         "changes.grad[t.start:t.start + t.rows].add_(flat[t.first:t.first + t.rows], alpha=t.weight)",
         "changes.grad[t.start:t.start + t.rows].add_(flat[t.first:t.first + t.rows])")),
    *_of("flexgs/model/deltas.py", "steps model", ("deltas linear in e", "math.log(ratio / left) / math.log(right / left)",
         "(ratio - left) / (right - left)")),
    *_of("flexgs/model/gsnet.py", "steps model", ("gi_weight ignored", "o.gi_weight * (m -", "1.0 * (m -"),
         ("sparsity_weight ignored", "o.sparsity_weight * (ratio", "1.0 * (ratio"),
         ("temperature constant", "o.temperature * (o.temperature_end / o.temperature) ** progress", "o.temperature"),
         ("temperature linear", "o.temperature * (o.temperature_end / o.temperature) ** progress",
          "o.temperature + (o.temperature_end - o.temperature) * progress"),
         ("inputs not detached", "x.detach() if self.options.detach else x)", "x)"),
         ("scales not centred", "splats.scales - self.scale\n", "splats.scales\n")),
    *_of("flexgs/model/field.py", "steps", ("a smoothness left out",
         "o.space_smoothness * (_Bend.apply(plane, 2) + ", "o.space_smoothness * (0.0 * _Bend.apply(plane, 2) + "),
         ("ratio_l1 around 0", "(plane - 1).abs().mean()", "plane.abs().mean()"),
         ("weights of the regularisers swapped", "o.ratio_smoothness * _Bend.apply(plane, 2) + o.ratio_l1 *",
          "o.ratio_l1 * _Bend.apply(plane, 2) + o.ratio_smoothness *"),
         ("planes with the rate of the field", '"lr": rates.planes', '"lr": rates.field'),
         ("field does not decay", '"lr": rates.field, "decay": 0.1', '"lr": rates.field, "decay": 1.0')),
    # a rate or schedule
    *_of("flexgs/training/optim.py", "rates", ("means do not decay", '0.01 if name == "means" else 1.0', "1.0"),
         ("means decay to a tenth", '0.01 if name == "means"', '0.1 if name == "means"'),
         ("means without scene_scale", "rates.means * scene_scale, ", "rates.means, "),
         ("sqrt(batch) dropped", 'last / first) ** progress * self.batch**0.5', 'last / first) ** progress'),
         ("betas not to the power of the batch", "beta2=0.999**self.batch", "beta2=0.999"),
         ("shN_factor ignored", "rates.shN * shN_factor", "rates.shN"),
         ("rates of quats and scales swapped", '"quats": rates.quats, "scales": rates.scales',
          '"quats": rates.scales, "scales": rates.quats')),
    *_of("flexgs/model/deltas.py", "rates", ("delta_means ignored", "rates.means * scene_scale * rates.delta_means",
         "rates.means * scene_scale"),
         ("deltas' means without scene_scale", "rates.means * scene_scale * rates.delta_means", "rates.means * rates.delta_means"),
         ("deltas' means do not decay", '0.01 if name == "means" else 1.0}', "1.0}")),
    *_of("flexgs/model/gsnet.py", "rates", ("selector does not decay", '"lr": config.lr.gsnet, "decay": 0.1',
         '"lr": config.lr.gsnet, "decay": 1.0')),
    *_of(TRAINER, "rates steps", ("progress of stage 2 is 0", "return (position - self.base_steps) / max(1,",
         "return 0 / max(1,"),
         ("progress of stage 2 by all steps", "max(1, self.config.steps - self.base_steps)", "max(1, self.config.steps)"),
         ("progress of stage 1 by all steps", "return position / self.base_steps", "return position / self.config.steps"),
         ("harmonics at once", "int(15 * position / self.base_steps)", "3"),
         ("harmonics more slowly", "int(15 * position", "int(10 * position"),
         ("estimate of all steps", "(work(self.config.steps) - work(self.step))", "work(self.config.steps)")),
    # an order or a selection
    *_of(TRAINER, "draws", ("scores not reordered", "reorder(self.splats, self.optimizer, rows, self.shard), scores[rows]",
         "reorder(self.splats, self.optimizer, rows, self.shard), scores"),
         ("uniform is log-uniform", 'if r.sampling == "uniform" else', "if False else"),
         ("the same ratio for all renders", '"ratio", turn, i)', '"ratio", turn)'),
         ("points not drawn but the first", "chosen = order[:base.max_splats]",
          "chosen = order.sort().values[:base.max_splats]")),
    *_of(CONFIG, "draws", ("upper cut from the first band", "(self.bands[-1][1], 1.0)", "(self.bands[0][1], 1.0)")),
    *_of("flexgs/model/order.py", "draws model", ("noise subtracted", "logs + temperature * noise",
         "logs - temperature * noise")),
    *_of("flexgs/scene/views.py", "draws", ("the same order in every epoch", '"views", epoch)', '"views")'),
         ("seed of the views ignored", 'generator(self.seed, "views"', 'generator(0, "views"')),
    # background and masks
    *_of("flexgs/evaluate.py", "evaluation", ("evaluation on black", "render(splats, camera, background=background, config=raster)",
         "render(splats, camera, config=raster)"),
         ("evaluation without mask", "if mask is not None:\n        image", "if False:\n        image"),
         ("no clamp before PSNR", ".image.clamp(0, 1)\n    ms", ".image\n    ms"),
         ("encoder sees test views", "options.format, scene.train)", "options.format, test)"),
         ("size in 2^20", "size / 1e6", "size / 2**20"),
         ("odd views are even", '"even": 0, "odd": 1}', '"even": 1, "odd": 0}')),
    *_of("flexgs/image/lpips.py", "evaluation", ("LPIPS in the other range", 'self.inputs == "[-1, 1]"',
         'self.inputs == "[0, 1]"')),
    *_of(TRAINER, "steps", ("renders on black", "exchanged(projections), camera, background=self.background,",
         "exchanged(projections), camera,"),
         ("whole without mask", "ssim=weights.full_ssim, mask=mask)", "ssim=weights.full_ssim)"),
         ("cuts without mask", "ssim=self.config.loss.elastic_ssim, mask=mask)", "ssim=self.config.loss.elastic_ssim)"),
         ("stage 1 without mask", "ssim=self.config.base.ssim, mask=mask)", "ssim=self.config.base.ssim)"),
         ("opacities without the selector's factor", "camera, mask=selection.mask, config",
          "camera, config")),
    *_of("flexgs/image/losses.py", "steps losses", ("half size counts with one of four", "[:, :, 0] == 1", "[:, :, 0] > 0")),
    # shards
    *_of("flexgs/distributed/shards.py", "sharded", ("received in the order of ranks", "order = bits[:, 3].argsort()",
         "order = torch.arange(len(bits))"),
         ("gradients of the wrong rows", "swapped(gradient, ctx.receive, ctx.send)", "swapped(gradient.flip(0), ctx.receive, ctx.send)"),
         ("places of the next worker", "to = places % world", "to = (places + 1) % world")),
    *_of("flexgs/training/densify.py", "sharded", ("noise of the first halves of a shard", ".to(mine.device)[mine]",
         ".to(mine.device)[:len(mine)]")),
    # presets
    *_of(CONFIG, "presets", ("paper's weights swapped", "elastic_l1=0.5, elastic_ssim=0.1)  # row 9",
         "elastic_l1=0.1, elastic_ssim=0.5)  # row 9"),
         ("matryoshka with other weights", "config.loss.full_l1, config.loss.full_ssim\n",
          "config.loss.full_ssim, config.loss.full_l1\n"),
         ("official keeps moments", "config.lr.restart = True ", "config.lr.restart = False"),
         ("paper's share", "15 / 35 ", "20 / 35 "), ("paper's background", "config.background = (1.0, 1.0, 1.0)", "pass"),
         ("official's columns", "(64, 64, 64, 150)", "(64, 64, 64, 100)"),
         ("knots", "(0.01, 0.032, 0.1, 0.32, 0.5)", "(0.01, 0.032, 0.1, 0.32)"),
         ("lightgs keeps more", "config.order.keep = 0.1 ", "config.order.keep = 0.2 "),
         ("fast renders both", "config.ratios.alternate = True", "pass")),
    *_of(TRAINER, "densify", ("nothing grows", "grow = self.stage == 1", "grow = self.stage != 1")),
    # records
    *_of(TRAINER, "bookkeeping", ("seconds not restored", 'about["step"], about["seconds"]', 'about["step"], 0.0')),
    *_of("flexgs/compare.py", "bookkeeping", ("stage 1 not subtracted", 'results["train_seconds"] - before',
         'results["train_seconds"]'),
         ("bytes of the last model only", 'round(row["stored_mb"] + model', "round(model"),
         ("a cut without its training", "round(own + seconds", "round(seconds"),
         ("stage 1 for what has none", "0.0 if cell.from_nothing else", "")),
    # stores and studies
    *_of("flexgs/store.py", "interrupted store", ("state.json pushed first",
         '(there.endswith(f"/{DESCRIPTION}"), there)', '(not there.endswith(f"/{DESCRIPTION}"), there)'),
         ("equal size is fresh", "(file.stat().st_size, file.stat().st_mtime_ns) == (info.size, info.mtime_ns)",
          "file.stat().st_size == info.size"),
         ("what is gone is kept", "if str(file.relative_to(self.folder)) not in kept:", "if False:")),
    *_of("tuning/trial.py", "bookkeeping", ("bytes without the transform", ", *model.transform.state_dict().values()]", "]")),
    *_of("tuning/study.py", "bookkeeping", ("best by another objective", "(values(record, objective)[0], -record.number)",
         '(values(record, "psnr_auc")[0], -record.number)'),
         ("the latest of equal ones", "-record.number))", "record.number))"),
         ("front the other way", '"mb": "min"}', '"mb": "max"}')),
    *_of("tuning/space.py", "bookkeeping", ("parameters rounded", 'f"{value:.6g}"', 'f"{value:.1g}"')),
    # densification
    *_of("flexgs/training/densify.py", "densify", ("width and height swapped", "[camera.width / 2, camera.height / 2]",
         "[camera.height / 2, camera.width / 2]"),
         ("large ones never pruned", "if prune_large:", "if False:"), ("split scale", "math.log(1.6)", "math.log(1.5)"),
         ("clone and split swapped", "grow & ~large, grow & large", "grow & large, grow & ~large"),
         ("reset at a tenth", "math.log(0.01 / 0.99)", "math.log(0.1 / 0.9)"),
         ("moments kept at a reset", 'state["exp_avg"].zero_()', "pass"),
         ("smallest gradients first", "torch.argsort(mean, descending=True, stable=True)[:room]",
          "torch.argsort(mean, stable=True)[:room]"),
         ("observed gradient with the batch", "* half * scale)", "* half)"),
         ("sum, not mean", "self.gradient / self.seen.clamp(min=1)", "self.gradient"),
         ("resets after growing", "step < o.refine_stop * self.length:", "True:"),
         ("grows from the start", "o.refine_start * self.length < step", "0 < step")),
    # orders, settings, and what a run remembers
    *_of('flexgs/training/trainer.py', 'rates steps', ('stage 2 at the rate of stage 1', 'self.config.lr.shN_factor, self.unit)',
         '1.0, self.unit)')),
    *_of('flexgs/training/trainer.py', 'rates steps', ('rank never refreshed', 'self.order.refresh(self._scores())\n        total',
         'pass\n        total')),
    *_of('flexgs/model/order.py', 'draws', ('keep ignored', '[:count_at(self.config.order.keep, len(splats))]',
         '')),
    *_of('flexgs/model/order.py', 'draws', ('noise for every order', 'sampled_order(scores, 0.0, self.config.seed)',
         'sampled_order(scores, self.config.order.temperature, self.config.seed)')),
    *_of('flexgs/model/order.py', 'steps rates', ('the same Gumbel noise in every view', '"gumbel", *draw,',
         '"gumbel", draw[1],')),
    *_of('flexgs/model/order.py', 'steps rates', ('rank upside down', 'torch.argsort(scores, descending=True, stable=True)',
         'torch.argsort(scores, stable=True)')),
    *_of('flexgs/model/gsnet.py', 'draws model', ('order noise ignored', 'if self.options.order_noise:',
         'if False:')),
    *_of('flexgs/model/order.py', 'draws model', ('scores, not their logarithm', '.clamp(min=1e-300).log()\n    uniform',
         '.clamp(min=1e-300)\n    uniform')),
    *_of('flexgs/image/quality.py', 'evaluation', ('SSIM of another range', 'measure(a, b, data_range=1.0)',
         'measure(a, b, data_range=255.0)')),
    *_of('flexgs/config.py', 'presets', ('a learning rate', 'sh0: Rate = 2.5e-3',
         'sh0: Rate = 2.5e-4')),
    *_of('flexgs/config.py', 'presets', ('a threshold', 'grow_grad2d: Size = 2e-4',
         'grow_grad2d: Size = 1e-4')),
    *_of('flexgs/run.py', 'bookkeeping', ('a line lost on resume', 'if row["step"] <= step))',
         'if row["step"] < step))')),
    *_of('flexgs/run.py', 'bookkeeping', ('lines not forgotten', 'if row["step"] <= step))',
         'if True))')),
    *_of(CONFIG, "bookkeeping", ("base left out of the digest", '("seed", "background", "antialiased", "base")', '("seed", "background", "antialiased")'),
         ("rates left out of the digest", 'for key in ("means", "quats", "scales", "opacities", "sh0", "shN")', "for key in ()")),
    *_of('flexgs/training/optim.py', 'rates', ('epsilon not divided', '1e-15 / self.batch**0.5 / g.get',
         '1e-15 / g.get')),
]
