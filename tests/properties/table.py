"""The property table: a new part is one line here and inherits every property of its room (test_ROOM.py beside this file).

"room.name": [{options}, {other options}, ...]      each variant is tested; {} is the part at its defaults
"""

TABLE: dict[str, list[dict]] = {
    "schedules.constant": [{"value": 0.3}, {"value": 0.3, "warmup": 5}],
    "schedules.cosine": [{"peak": 0.3}, {"peak": 0.3, "end": 0.1, "warmup": 5}],
    "schedules.linear": [
        {"start": 0.3},
        {"start": 0.3, "end": 0.1, "warmup": 5},
        {"start": 0.1, "end": 0.3, "begin": 0.2, "until": 0.7},
    ],
    "schedules.steps": [{"values": [0.3, 0.1, 0.2], "at": [0.25, 0.75]}, {"values": [0.1, 0.3], "by": "round"}],
    "schedules.wsd": [{"peak": 0.3, "warmup": 5}, {"peak": 0.3, "end": 0.1, "decay": 0.5}],
    "optim.adamw": [{"lr": 0.05}, {"lr": 0.05, "betas": [0.8, 0.9], "weight_decay": 0.01}],
    "optim.sgd": [{"lr": 0.2}, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.001}],
    "objectives.sft.cross_entropy": [{}, {"per": "example"}],
    "objectives.classify.cross_entropy": [{}, {"label_smoothing": 0.2}],
    "objectives.classify.class_texts": [{"of": "data.sprites"}, {"of": "data.sprites", "template": "a {}", "look": 0.0}],
    "objectives.contrastive.clip": [{}],
    "objectives.robust.rmt": [{"contrast": 0.0}, {"contrast": 0.0, "reverse": 0.0, "replay": 0.5}],
    "objectives.robust.entropy_min": [{}],
    "objectives.preference.dpo": [{}, {"beta": 0.7, "label_smoothing": 0.2}, {"reference": "base"}],
    "objectives.preference.ipo": [{}, {"beta": 0.5}, {"reference": "base"}],
    "objectives.policy.grpo": [
        {},
        {"per": "sequence", "beta": 0.1},
        {"per": "constant", "max_new": 9, "scale": False, "clip_high": 0.3},
    ],
    "objectives.policy.ppo": [{"critic": None, "gamma": 1.0}, {"critic": None, "epochs": 1, "beta": 0.0}],
    "objectives.policy.score": [
        {},
        {"credit": [1.0], "beta": [0.2]},
        {"credit": [0.5, 1.0], "beta": [0.0, 0.0], "scale": True},
    ],
    "objectives.policy.value": [{}, {"clip": None}],
    "objectives.diffusion.reward_backprop": [{"rewards": ["rewards.brightness"]}],
    "objectives.consistency.ict": [
        {},
        {"first": 5, "last": 5, "teacher": "live", "huber": None, "spread": None, "weigh": False, "unsaid": 0.4},
        {"solver": "base", "guidance": 2.0},
    ],
    "objectives.diffusion.denoise": [{}, {"unsaid": 0.3, "min_snr": 5.0}],
    "objectives.diffusion.mmd": [{"steps": 2, "guidance": 1.0}, {"steps": 2, "features": "aides.pixels", "recompute": False}],
    "objectives.sft.behaviour_cloning": [{}],
    "objectives.sft.dft": [{}, {"per": "example"}],
    "objectives.sft.asft": [{}, {"direction": "reverse", "reference": "base", "per": "example"}],
    "regularizers.l1": [{"of": "new"}, {"of": "new", "per_entry": False, "weight": 0.3}],
    "regularizers.kl": [{}, {"direction": "forward", "weight": 0.7}, {"version": "start"}],
    "regularizers.dr_tune": [{"bank": 6}, {"bank": 9, "weight": 0.5, "calibrate": False, "version": "start"}],
    "regularizers.feature_consistency": [
        {"descriptions": {"disc": ["a red disc on navy", "a disc"], "bar": ["a blue bar"]}},
        {"version": "start", "weight": 0.5, "by": "mse", "look": 0.3},
    ],
    "adapters.lora": [{"rank": 3}, {"rank": 2, "alpha": 3.0, "rank_stabilised": True}, {"rank": 64}],
    "adapters.mixlora": [{"experts": 3, "rank": 2}],
    "adapters.class_head": [{"classes": ["a", "b", "c"]}, {"of": "data.digits", "name": "digits", "gain": 1.0}],
    "adapters.batch_statistics": [{}, {"kept": 0.7}],
    "adapters.projection_head": [{}, {"prototypes": "data.digits", "width": 5, "name": "other"}],
    "adapters.side.hst": [{"classes": ["a", "b", "c"], "widths": [8, 12], "heads": [2, 3]}],
    "adapters.clip_residual_adapter": [{}, {"image": 0.0, "text": 0.7, "reduction": 2}],
    "adapters.multimodal_prompt": [{}, {"tokens": 3, "depth": 1}],
    "adapters.value_head": [{}, {"name": "right"}, {"hidden": 8}],
    "adapters.residual_policy": [{}, {"width": 8, "scale": 0.5, "gain": 0.01}],
    "adapters.copilot": [{}, {"layers": 3, "factor": 5.0, "keep": 2}],
    "adapters.head_scale": [{}],
    "adapters.head_offset": [{"by": "random", "count": 3}],
    "adapters.init.eva": [{}],
    "select.lift": [{"rank": 4, "budget": 2}],
    "select.lottery_ticket": [{"of": "a"}],
    "select.full": [{}, {"freeze": ["norm"]}],
    "select.half": [{}, {"by": "layer"}, {"by": "model", "share": 0.3}, {"outside": False}],
    "merge.linear": [{}, {"normalise": False}, {"scale": 0.4}],
    "merge.lines": [{}, {"alpha": 0.3, "beta": 0.9}, {"of": {"merge.linear": {"scale": 0.5}}}],
    "merge.task_arithmetic": [{"scale": 0.4}],
    "merge.ties": [{"density": 0.5}],
    "merge.dare": [{"seed": 3}],
    "merge.della": [{}],
    "merge.breadcrumbs": [{"density": 0.4}],
    "merge.sce": [{"density": 0.6}],
    "merge.slerp": [{"t": 0.3}],
    "merge.multislerp": [{}],
    "merge.karcher": [{}],
    "merge.model_stock": [{}, {"by": "row"}],
    "merge.passthrough": [{"scale": 0.9}],
    "merge.compeft": [{}],
    "merge.pleas": [{"match": "weights", "solve": False}],
    "merge.graft": [{"of": "a"}],
    "merge.half_reset": [{"share": 0.3}],
    "merge.scale_intruders": [{}],
    "merge.soup_uniform": [{}],
    "merge.soup_greedy": [{}],
    "merge.norm_statistics": [{"data": {"data.sprites": {"rows": 9}}, "batches": 2, "rows": 4}],
    "merge.soup_learned": [{"of": ["a", "b"], "by": "layer"}],
    "merge.sparse_sum": [{}],
    "surgery.liger": [{"window": 8}],
    "decode.repetition_penalty": [{}],
    "decode.eft": [{"tuned": "lab/lm", "reference": "lab/lm"}],
    "decode.copilot": [{}, {"lam": 0.5}],
    "decode.second_turn": [{}],
    "decode.conjugate_prompt": [{}, {"rewrite": [["add (.*)", "the sum of \\1"]], "form": "mirror"}],
    "decode.ftc_scaling": [{}, {"alpha": 0.75}],
    "decode.fk_steering": [{"reward": {"rewards.pattern": {"pattern": "a"}}, "every": 4}],
    "sample.fk_steering": [
        {"reward": "rewards.brightness"},
        {"reward": "rewards.brightness", "potential": "diff", "ess": 0.5, "give": "draw"},
    ],
    "sample.style_injection": [{"style": "FILE"}, {"style": "FILE", "gamma": 0.5, "adain": False}],
    "sample.rl_guidance": [{}, {"weight": 0.5, "alone": 2}],
    "aides.match": [{}, {"by": "number"}],
    "aides.lab_oracle": [{}],
    "aides.pixels": [{}],
    "aides.encoder": [{}],
    "aides.sprite_eye": [{}],
    "aides.random_features": [{}, {"width": 5, "cells": 1, "seed": 3}],
    "diagnose.intruder_dimensions": [{}, {"k": 3, "eps": 0.8}],
    "diagnose.tuco": [{}, {"sets": {"one": {"data.lab": {"skills": ["add"], "rows": 4}}}, "norm": 2}],
    "diagnose.sharpness": [{}, {"case": "average", "norm": "2"}],
    "diagnose.interpolation": [{}],
    "diagnose.skill_overlap": [{"share": 0.1}],
    "rewards.exact": [{}],
    "rewards.number": [{}],
    "rewards.pattern": [{"pattern": r"\d+"}, {"pattern": r"[a-z ]*", "whole": True}],
    "rewards.lab": [{}],
    "rewards.brightness": [{}, {"target": 0.3}],
    "rewards.colour": [{}, {"target": [0.1, 0.9, 0.5]}],
    "rewards.compressibility": [{}],
    "rewards.similarity": [{}],
    "data.lab": [{"skills": ["shift"]}, {"skills": ["shift", "copy"], "rows": 7}],
    "data.file": [{"path": "FILE"}],
    "data.mix": [
        {"sources": [{"data.file": {"path": "FILE"}}, {"data.lab": {"skills": ["copy"], "rows": 9}}], "weights": [3.0, 1.0]}
    ],
    "data.folder_images": [{"path": "FOLDER"}, {"path": "FOLDER", "holdout": 0.3, "limit": 20}],
    "data.sprites": [
        {"rows": 23},
        {"label": "colour", "rows": 9, "domain": "fog", "subjects": [1, 2]},
        {"figures": 3, "rows": 9, "domain": "shifted"},
    ],
    "data.digits": [{"rows": 23}],
    "data.captions": [{"captions": ["a red dog", "a cat", "two cats"]}],
    "data.sprite_subject": [{}, {"sprite": 2, "pictures_of_it": 3, "seed": 5}],
    "data.prior_preservation": [{"of": {"data.sprite_subject": {}}, "noun": "cross", "identifier": "sks"}],
    "data.few_shot": [
        {"of": "data.sprites", "only": ["bar", "disc", "cross"], "shots": 5},
        {"of": {"data.digits": {"rows": 400}}, "shots": 2, "seed": 3},
    ],
    "data.self_play": [{"rows": {"data.lab": {"skills": ["add"], "rows": 6}}}],
    "data.best_of_k": [{"prompts": {"data.lab": {"skills": ["add"], "rows": 6}}, "rewards": ["rewards.lab"], "k": 2}],
    "data.corrections": [{"rows": {"data.lab": {"skills": ["add"], "rows": 6}}, "rewards": ["rewards.lab"], "first": "wrong"}],
    "data.s3ft": [{"rows": {"data.lab": {"skills": ["add"], "rows": 6}}}],
    "data.demonstrations": [{"task": "insert", "episodes": 23}, {"task": "wide", "episodes": 9, "aim": 0.0, "shake": 0.0}],
    "rollout.test_stream": [
        {"domains": ["data.sprites"]},
        {"domains": [{"data.sprites": {"domain": "fog"}}, "data.sprites"], "rows": 9, "repeats": 2, "replay": "data.sprites"},
    ],
    "rollout.episodes": [{"task": "insert"}, {"task": "reach", "explore": "plan", "group": 4}],
    "rollout.relift": [
        {
            "rollout": {
                "rollout.sample": {
                    "prompts": {"data.lab": {"skills": ["add"], "rows": 6}},
                    "rewards": ["rewards.lab"],
                    "group": 2,
                }
            },
            "demonstrations": {"data.lab": {"skills": ["add"], "rows": 6}},
            "due": 2,
        }
    ],
    "rollout.mcts_steps": [
        {"prompts": {"data.lab": {"skills": ["story"], "rows": 6}}, "rewards": ["rewards.lab"], "separator": ";", "stage": 2}
    ],
    "rollout.raft": [
        {"prompts": {"data.lab": {"skills": ["add"], "rows": 6}}, "rewards": ["rewards.lab"], "k": 2, "stage": 3, "max_new": 6}
    ],
    "rollout.two_turn": [
        {"prompts": {"data.lab": {"skills": ["add"], "rows": 6}}, "rewards": ["rewards.lab"], "group": 2, "alpha": 2.0}
    ],
    "rollout.sample": [
        {"prompts": {"data.lab": {"skills": ["add"], "rows": 6}}, "rewards": ["rewards.lab"], "group": 2, "max_new": 6}
    ],
    "rollout.denoising_chain": [
        {"captions": {"data.captions": {"captions": ["a disc"]}}, "rewards": ["rewards.brightness"]},
    ],
    "evaluate.kid": [{"of": {"data.captions": {"captions": ["a disc"]}}, "items": 5}],
    "evaluate.lab": [{"target": "shift"}, {"retained": ["copy"], "items": 3}],
    "evaluate.pictures": [{}, {"factors": ["colour"], "items": 3}, {"of": "data.digits", "role": "retained"}],
    "evaluate.prequential": [{"of": {"rollout.test_stream": {"domains": ["data.sprites"]}}, "items": 5}],
    "evaluate.control": [{"target": "insert"}, {"retained": ["lift"], "items": 3}],
    "evaluate.file": [{"data": {"data.file": {"path": "FILE"}}}],
    "evaluate.keep_pictures": [{}, {"items": 4, "captions": ["", "a dog"]}],
    "evaluate.subject": [{"of": {"data.sprite_subject": {}}, "prior": ["a cross"], "features": "aides.sprite_eye"}],
    "evaluate.rewarded": [{"reward": "rewards.brightness"}, {"reward": {"rewards.colour": {}}, "level": 0.8}],
    "evaluate.keep": [{"items": 4, "length": 5}],
    "studies.budget": [{"budgets": [16, 64]}, {"budgets": [30.5], "shares": [0.0, 1.0], "cost_pref": 2.0, "seeds": [0, 1]}],
    "studies.compare": [{"arms": {"half": {"trainable": ["select.half"]}}, "seeds": [0, 1]}],
}


def variants(room: str) -> list:
    """Every (name, options) of a room, as pytest parameters."""
    import pytest

    rows = [(name, o) for name, options in TABLE.items() if name.startswith(room + ".") for o in options]
    return [pytest.param(name, o, id=f"{name}-{i}") for i, (name, o) in enumerate(rows)]
