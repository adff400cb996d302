"""Break what decides whether RLHF code is right, one place at a time, and see whether the tests notice.

    make mutants                                  all of them
    python tests/mutations.py whitening ratio     those whose name holds one of the words

Each mutation is made in a copy of the checkout, and the tests named beside it run there. It is *killed* if they fail,
and *survives* if they pass: then a test is missing. The same tests pass on the copy before anything is broken.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import queue
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """A text of a file, what takes its place, and the tests that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


ROLLOUT, TEXT_ENV = "tests/lm_envs/env/test_rollout.py", "tests/lm_envs/env/test_text_env.py"
LOSSES, ADVANTAGES = "tests/algos/ops/test_losses.py", "tests/algos/ops/test_advantages.py"
AGENT, ALGORITHMS = "tests/algos/engine/test_agent.py", "tests/algos/test_algorithms.py"
GROUPS, GRADIENT = "tests/algos/ops/test_group_baselines.py", "tests/algos/engine/test_policy_gradient.py"
ACTOR_CRITIC = "tests/algos/other_libraries/test_network.py"
ADAPTATION = "tests/algos/policies/test_adaptation.py"
FAMILIES, MODELS = "tests/lm_envs/model/test_families.py", "tests/lm_envs/model/test_loading.py"
ENDINGS, TEXT = "tests/lm_envs/model/test_endings.py", "tests/lm_envs/model/test_text.py"
DATASET, TOKENIZING = "tests/lm_envs/data/test_dataset.py", "tests/lm_envs/data/test_tokenizing.py"
SAVED = "tests/benchmarks/commands/test_saved_models.py"
LEARN, SAME_IDS = "tests/benchmarks/commands/test_learn.py", "tests/benchmarks/run/test_same_ids.py"
VARIANTS, CRITICS = "tests/algos/test_ppo_variants.py", "tests/algos/policies/test_critics.py"
TOKENS, PREFERENCES = "tests/algos/policies/test_reward_tokens.py", "tests/algos/engine/test_comparisons.py"
COST = "tests/benchmarks/measure/test_cost.py"
DISTILLATION = "tests/algos/test_distillation.py"
BOND, XPO = "tests/algos/test_bond.py", "tests/algos/test_xpo.py"
FAMILY, TRUST = "tests/algos/test_grpo_family.py", "tests/algos/test_trpo.py"
SELECT = "tests/algos/engine/test_select.py"
OFF_POLICY = "tests/algos/engine/test_off_policy.py"
CAPABILITIES = "tests/algos/policies/test_capabilities.py"
COLUMNS = "tests/lm_envs/reward/test_columns.py"
KL_COEF = "tests/benchmarks/run/test_kl_coef.py"
JUDGE, REWARDS = "tests/lm_envs/reward/test_judge.py", "tests/lm_envs/reward/test_base.py"
MISBEHAVING = "tests/lm_envs/reward/test_judge_misbehaving.py"
MANY = "tests/algos/engine/test_many_processes.py"
SHARING, BEATS = "tests/lm_envs/processes/test_sharing.py", "tests/lm_envs/processes/test_heartbeats.py"
GLOO = "tests/lm_envs/processes/test_gloo.py::test_processes_are_one"
STORAGE, ONE_RUN = "tests/benchmarks/run/test_storage.py", "tests/benchmarks/run/test_one_run.py"
INPUTS = "tests/benchmarks/run/test_inputs.py"
CONTRACTS = "tests/benchmarks/run/test_contracts.py::test_what_is_broken_is_reported_by_its_line"
PACKED = "tests/algos/test_packed_data.py"
REPORTED = "tests/benchmarks/test_recomputed_report.py"
SAMPLES, EXACT = "tests/benchmarks/measure/test_samples.py", "tests/benchmarks/measure/test_exact.py"
ITERATED = "tests/algos/test_iterated_rlhf.py"
RECOMPUTED = "tests/benchmarks/test_recomputed.py"
SB3 = "tests/algos/other_libraries/test_sb3.py::"
FEEDBACK, STUDIES = (f"tests/lm_envs/feedback/test_recomputed_{name}.py" for name in ("results", "store"))
PEOPLE = "tests/benchmarks/commands/test_people_recomputed.py"
AGGREGATE = "tests/benchmarks/run/test_recomputed_aggregate.py"

MUTATIONS = [
    # AlpacaFarm's table
    Mutation(
        "a vote is for what ranks first",
        "lm_envs/feedback/annotators.py",
        "np.sign(theirs - ours)",
        "np.sign(ours - theirs)",
        "tests/benchmarks/measure/test_simulated.py::test_votes_without_noise_are_the_score",
    ),
    Mutation(
        "annotators that judge are not those that teach",
        "lm_envs/feedback/annotators.py",
        "seed=len(_POOL) * seed + i)",
        "seed=i)",
        "tests/lm_envs/tasks/test_preferences.py::test_no_annotator_is_asked_twice",
    ),
    Mutation(
        "the learned reward learns what was chosen",
        "lm_envs/tasks/preferences.py",
        "fit_probe(states[:, 0] - states[:, 1],",
        "fit_probe(states[:, 1] - states[:, 0],",
        "tests/lm_envs/tasks/test_preferences.py::test_it_learns_what_annotators_choose",
    ),
    Mutation(
        "a task's own choices are learned, not new ones",
        "algos/engine/comparisons.py",
        "    if task.preferred:\n",
        "    if not task.preferred:\n",
        "tests/lm_envs/tasks/test_preferences.py::test_algorithms_that_learn_from_preferences_take_the_same_choices",
    ),
    Mutation(
        "examples stand before the prompt",
        "algos/few_shot.py",
        "mdp.codec.encode(before + text)",
        "mdp.codec.encode(text + before)",
        "tests/algos/test_few_shot.py::test_in_text_examples_stand_before_the_prompt_and_law_3_holds",
    ),
    Mutation(
        "runs of another task or with other options have SFT samples of their own",
        "benchmarks/measure/samples.py",
        "self._held[0] is not task or self._held[1] != key",
        "self._held[1] != key",
        "tests/benchmarks/measure/test_simulated.py::test_runs_of_a_process_share_the_samples_of_sft",
    ),
    # Tasks on real text
    Mutation(
        "an empty response meets no constraint",
        "lm_envs/reward/constraints.py",
        "return bool(_words(text)) and KINDS",
        "return KINDS",
        "tests/lm_envs/reward/test_constraints.py::test_shares_by_hand",
    ),
    Mutation(
        "less than n words in IFEval is at most n - 1",
        "lm_envs/tasks/instruct.py",
        '{"most": given[number] - 1}',
        '{"most": given[number]}',
        "tests/lm_envs/tasks/test_instruct.py::test_ifeval_columns",
    ),
    Mutation(
        "pass@k draws without replacement",
        "benchmarks/measure/attempts.py",
        "np.maximum(wrong - i, 0) / (samples - i)",
        "np.maximum(wrong, 0) / samples",
        "tests/benchmarks/measure/test_attempts.py::test_the_estimator_is_the_mean_over_all_subsets",
    ),
    Mutation(
        "a sensitive task's samples are not in the report",
        "benchmarks/report/html.py",
        'described.get("sensitive", False) and not show',
        'described.get("sensitive", False) and show',
        "tests/benchmarks/run/test_results.py::test_samples_of_a_sensitive_task_are_in_the_report_only_when_asked",
    ),
    Mutation(
        "items of a file keep the columns for rewards",
        "benchmarks/commands/people_items.py",
        "known=dense_ranks(ranks), columns=columns)",
        "known=dense_ranks(ranks))",
        "tests/benchmarks/commands/test_people.py::test_items_of_a_file_keep_the_columns_for_rewards",
    ),
    Mutation(
        "helping is not declining",
        "lm_envs/tasks/harmless.py",
        "about * _is_answer(text) - _says(text, phrases.decline)",
        "about * _is_answer(text)",
        "tests/lm_envs/tasks/test_harmless.py::test_the_parts_by_hand",
    ),
    Mutation(
        "a sentence pays with its last token",
        "lm_envs/reward/sentences.py",
        "bisect.bisect_left(",
        "bisect.bisect_right(",
        "tests/lm_envs/reward/test_sentences.py::test_a_sentence_pays_with_its_last_letter",
    ),
    Mutation(
        "the better summary is the reference",
        "lm_envs/tasks/summarise.py",
        "example.ranks.index(0)",
        "example.ranks.index(1)",
        "tests/lm_envs/tasks/test_summarise.py::test_rows_of_tldr",
    ),
    Mutation(
        "information flow compares with the same speaker",
        "lm_envs/tasks/dialogue.py",
        "context[i][-2] for i",
        "context[i][-1] for i",
        "tests/lm_envs/tasks/test_dialogue.py::test_flow_compares_with_the_same_speakers_turn",
    ),
    Mutation(
        "a minus sign belongs to an answer",
        "lm_envs/tasks/reasoning.py",
        'rf"[^\\w-]*(',
        'rf"\\W*(',
        "tests/lm_envs/tasks/test_reasoning.py::test_scores_by_hand",
    ),
    Mutation(
        "a probe reads the response, not its prompt",
        "lm_envs/reward/likelihood.py",
        "mask = (ids >= 0) & (places >=",
        "mask = (ids >= 0) & (places >= 0 *",
        "tests/lm_envs/reward/test_likelihood.py::test_hidden_states_after_a_context_and_a_layer",
    ),
    Mutation(
        "a probe's prior is chosen on prompts that it has not seen",
        "lm_envs/reward/probe.py",
        "number % folds",
        "np.arange(len(group)) % folds",
        "tests/lm_envs/reward/test_probe.py::test_pairs_of_a_prompt_are_held_out_together",
    ),
    Mutation(
        "a text's likelihood leaves out its context",
        "lm_envs/reward/likelihood.py",
        "logprob.sum(dim=1) / (response >= 0).sum(dim=1)",
        "logprob.sum(dim=1) / (response >= -1).sum(dim=1)",
        "tests/lm_envs/reward/test_likelihood.py::test_means_are_those_of_one_forward",
    ),
    Mutation(
        "options that are given come before those in a task's name",
        "lm_envs/tasks/__init__.py",
        "options = {**given, **options}",
        "options = {**options, **given}",
        "tests/lm_envs/tasks/test_names.py::test_they_reach_the_loader_behind_what_is_given",
    ),
    # Numbers that a step on the way loses: a setting, a seed, a split, a term, a mean
    Mutation(
        "scores are in units of the method's own spread",
        "benchmarks/measure/samples.py",
        '"sft_gold_sd": float(reference.gold.std(ddof=1))',
        '"sft_gold_sd": float(found.gold.std(ddof=1))',
        "tests/benchmarks/measure/test_samples.py::test_best_of_n_pays_for_all_its_samples",
    ),
    Mutation(
        "a rollout keeps the values of an untrained head beside a Q critic",
        "algos/policies/language_model.py",
        "if self.critic is not None or self.q_head is not None or not self.keeps_logprob:",
        "if self.critic is not None or not self.keeps_logprob:",
        "tests/algos/policies/test_critics.py::test_values_that_a_rollout_keeps_are_those_of_a_second_reading",
    ),
    Mutation(
        "labels of cells keep their spaces",
        "lm_envs/data/conventions.py",
        "value.strip().lower())",
        "value.lower())",
        "tests/lm_envs/data/test_exact_rows.py::test_ranks_and_labels_of_csv",
    ),
    Mutation(
        "a comparison's article comes before its post",
        "lm_envs/data/conventions.py",
        'info.get("post") or info.get("article")',
        'info.get("article") or info.get("post")',
        "tests/lm_envs/data/test_exact_rows.py::test_comparisons_of_summaries",
    ),
    Mutation(
        "an unlabeled demonstration is ranked as unwanted",
        "lm_envs/data/packed.py",
        "int(example.label == 0)",
        "int(example.label != 1)",
        "tests/lm_envs/data/test_exact_rows.py::test_the_table_of_a_packed_folder",
    ),
    Mutation(
        "validation and test exchange their tenths",
        "lm_envs/data/splits.py",
        "for name in SPLITS[1:] if name",
        "for name in reversed(SPLITS[1:]) if name",
        "tests/lm_envs/data/test_exact_rows.py::test_splits_names_shares_and_a_tenth",
    ),
    Mutation(
        "every iteration of control plays the first episodes",
        "algos/engine/sampling.py",
        "seed=config.seed, first_episode=episodes_done)",
        "seed=config.seed, first_episode=0)",
        "tests/algos/engine/test_recomputed_updates.py::test_what_an_iteration_of_control_counts",
    ),
    Mutation(
        "the early stop reads the mean over all minibatches so far",
        "algos/engine/agent.py",
        "if self.should_stop(mine.means()):",
        "if self.should_stop(averages.means()):",
        "tests/algos/engine/test_recomputed_updates.py::test_the_early_stop_reads_its_own_minibatch",
    ),
    Mutation(
        "the mean of the processes' gradients",
        "lm_envs/processes/sharing.py",
        'group.add(flat, "the sum of gradients")',
        'group.add(flat.div_(group.world()), "the sum of gradients")',
        MANY,
    ),
    Mutation(
        "shares of gradients are averaged",
        "algos/engine/shards.py",
        "made.set_gradient_divide_factor(1.0)",
        "made.set_gradient_divide_factor(2.0)",
        GLOO,
    ),
    Mutation(
        "an evaluation that only keeps step with the other processes counts",
        "algos/engine/agent.py",
        "(count / whole) if counts else 0.0)",
        "(count / whole))",
        GLOO,
    ),
    Mutation(
        "each share of the gradient is clipped by its own norm",
        "algos/engine/shards.py",
        "max_grad_norm, _norm_of_all)",
        "max_grad_norm)",
        GLOO,
    ),
    Mutation(
        "idle models are whole during an update of shares",
        "algos/engine/shards.py",
        "if p not in cuts and can_be_cut(p):",
        "if p in cuts:",
        GLOO,
    ),
    Mutation(
        "a reference that the loss reads stays cut",
        "algos/engine/shards.py",
        "                    cuts[p].join()\n",
        "                    pass\n",
        GLOO,
    ),
    Mutation(
        "an agent that lost its weights goes on",
        "algos/engine/shards.py",
        "        self._lost = True\n",
        "        self._lost = False\n",
        GLOO,
    ),
    Mutation(
        "all processes evaluate the first one's rows before an update",
        "algos/engine/batching.py",
        "traj = traj.select(torch.from_numpy(self._shares[group.rank()]))",
        "traj = traj.select(torch.from_numpy(self._shares[0]))",
        f"{MANY}::test_what_was_before_an_update_is_of_all_rows",
    ),
    Mutation(
        "pairs are cut between processes",
        "algos/engine/batching.py",
        "mine = sharing.shares(costs(traj).cpu(), together)[group.rank()]",
        "mine = sharing.shares(costs(traj).cpu())[group.rank()]",
        f"{MANY}::test_many_processes_are_one",
    ),
    Mutation(
        "each process stops by its own minibatch's KL",
        "algos/engine/agent.py",
        'mine = Averages().join(*exchange(mine, "the metrics of a minibatch"))',
        "mine = Averages().join(mine)",
        MANY,
    ),
    Mutation(
        "groups are cut between processes",
        "lm_envs/processes/sharing.py",
        "np.arange(len(cost)) if unit is None else",
        "np.arange(len(cost)) if True else",
        SHARING,
    ),
    Mutation(
        "who works long is lost as soon as who does not",
        "lm_envs/processes/heartbeats.py",
        "self._limit + _PER_WORK * (now - self._worked_from)",
        "self._limit",
        BEATS,
    ),
    Mutation(
        "who waits for a judge hangs",
        "lm_envs/processes/heartbeats.py",
        "reached < steps and not excused and",
        "reached < steps and",
        BEATS,
    ),
    Mutation(
        "minibatches are numbered by epoch",
        "algos/engine/batching.py",
        "first = (iteration * config.epochs + epoch) * config.minibatches",
        "first = iteration * config.epochs + epoch",
        "tests/algos/engine/test_recomputed_updates.py::test_minibatches_are_numbered_through_the_run",
    ),
    Mutation(
        "the sampler's KL is measured after every step",
        "algos/engine/agent.py",
        ("        self._first_step = False  # from here on the policy is another one\n"),
        "",
        "tests/algos/engine/test_recomputed_updates.py::test_the_samplers_kl_is_measured_before_the_first_step_alone",
    ),
    Mutation(
        "KTO's accuracy forgets the baseline",
        "algos/engine/preference_losses.py",
        "((ratio > baseline) == wanted)",
        "((ratio > 0) == wanted)",
        "tests/algos/test_recomputed_metrics.py::test_ktos_metrics_and_weights",
    ),
    Mutation(
        "a tie counts as ordered",
        "algos/engine/preference_losses.py",
        "(pairs & (margin > 0)).sum()",
        "(pairs & (margin >= 0)).sum()",
        "tests/algos/test_recomputed_metrics.py::test_a_tie_orders_nothing_rightly",
    ),
    Mutation(
        "annotators' pairs are sampled at temperature 1",
        "lm_envs/tasks/sampling.py",
        ("        temperature=task.temperature,\n"),
        "",
        "tests/algos/test_recomputed_metrics.py::test_sampled_pairs_are_the_tasks_and_the_seeds",
    ),
    Mutation(
        "a reward model's weight decay is lost",
        "algos/engine/judged_pairs.py",
        ("        weight_decay=weight_decay,\n"),
        "",
        "tests/algos/test_recomputed_metrics.py::test_a_reward_model_is_trained_by_its_settings",
    ),
    Mutation(
        "iterated RLHF's rounds share numbers of pairs",
        "algos/iterated_rlhf.py",
        "first = number * (count + config.held_out)",
        "first = number * count",
        "tests/algos/test_recomputed_metrics.py::test_each_rounds_pairs_model_and_cost",
    ),
    Mutation(
        "Quark draws the same places in every iteration",
        "algos/quark.py",
        "np.random.default_rng((config.seed, self.iterations_done, _DRAW))",
        "np.random.default_rng((config.seed, 0, _DRAW))",
        "tests/algos/test_recomputed_metrics.py::test_quark_draws_by_the_seed_and_the_iteration",
    ),
    Mutation(
        "vBoN's reference samples are those of seed 0",
        "algos/engine/sampling.py",
        "rng.uniform(agent.config.seed, rng.TOKEN",
        "rng.uniform(0, rng.TOKEN",
        "tests/algos/test_recomputed_metrics.py::test_vbons_samples_and_its_gain",
    ),
    Mutation(
        "best-of-n's ends are not counted as tokens",
        "algos/best_of_n.py",
        "int((response >= 0).sum())",
        "int((response > 0).sum())",
        "tests/algos/test_recomputed_metrics.py::test_best_of_n_counts_every_token_and_every_score",
    ),
    Mutation(
        "REINFORCE pays for certainty",
        "algos/reinforce.py",
        "loss = loss - config.entropy_coef * sequence",
        "loss = loss + config.entropy_coef * sequence",
        "tests/algos/engine/test_recomputed_losses.py",
    ),
    Mutation(
        "REINFORCE's value loss is a mean over tokens",
        "algos/reinforce.py",
        "config.value_coef * sequence_mean(value, mask)",
        "config.value_coef * value.sum() / mask.sum()",
        "tests/algos/engine/test_recomputed_losses.py",
    ),
    Mutation(
        "PPO's value is clipped at twice the distance",
        "algos/ppo.py",
        'fixed["old_value"], self.config.value_clip',
        'fixed["old_value"], 2 * self.config.value_clip if self.config.value_clip else None',
        "tests/algos/engine/test_recomputed_losses.py",
    ),
    Mutation(
        "the reward model's critic forgets how a label is read",
        "algos/policies/critics.py",
        "self.label, self.output, independent=independent)",
        "self.label, independent=independent)",
        "tests/algos/policies/test_critics.py::test_the_values_label_and_output_are_the_rewards",
    ),
    Mutation(
        "the corpus's language model learns at the reward model's rate",
        "lm_envs/tasks/corpus.py",
        "learning_rate=config.lm_learning_rate",
        "learning_rate=config.rm_learning_rate",
        "tests/lm_envs/tasks/test_settings_reach_their_use.py::test_corpus",
    ),
    Mutation(
        "the corpus's reward model starts from random weights",
        "lm_envs/tasks/corpus.py",
        ("    reward_model.transformer.load_state_dict(policy.transformer.state_dict())\n"),
        "",
        "tests/lm_envs/tasks/test_settings_reach_their_use.py::test_corpus",
    ),
    Mutation(
        "label smoothing is left out",
        "lm_envs/tasks/translation.py",
        ", label_smoothing=config.label_smoothing)",
        ")",
        "tests/lm_envs/tasks/test_settings_reach_their_use.py::test_translation",
    ),
    Mutation(
        "translation is measured on test prompts",
        "lm_envs/tasks/translation.py",
        'greedy(model, prompts["validation"]',
        'greedy(model, prompts["test"]',
        "tests/lm_envs/tasks/test_settings_reach_their_use.py::test_translation_measures_on_validation",
    ),
    Mutation(
        "a custom task's samples are drawn at temperature 1",
        "lm_envs/tasks/custom.py",
        ("            temperature=config.temperature,\n            seed"),
        "            seed",
        "tests/lm_envs/tasks/test_settings_reach_their_use.py::test_custom",
    ),
    Mutation(
        "AdamW's second moment is PyTorch's",
        "lm_envs/training.py",
        "betas=(0.9, 0.95)",
        "betas=(0.9, 0.999)",
        "tests/lm_envs/test_training.py::test_the_loop_is_adamw_by_hand",
    ),
    Mutation(
        "a chat's second end is no end to the missing-EOS option",
        "lm_envs/env/mdp.py",
        "cut = ~is_eos(response, self.eos_token_ids).any(axis=1)",
        "cut = ~is_eos(response, self.eos_token_ids[:1]).any(axis=1)",
        "tests/lm_envs/env/test_exact_infos.py::test_any_end_stops_a_response",
    ),
    Mutation(
        "reports move up where a row restarts",
        "lm_envs/env/vector.py",
        "lengths, True, reported[rows]",
        "lengths, True, reported[: len(rows)]",
        "tests/lm_envs/env/test_exact_infos.py::test_reports_of_some_rows_are_those_rows",
    ),
    Mutation(
        "an env's seed counts in 32 bits",
        "lm_envs/env/rows.py",
        "self._seed = drawn % 2**64",
        "self._seed = drawn % 2**32",
        "tests/lm_envs/env/test_exact_infos.py::test_a_seed_counts_in_all_its_bits_and_episodes_count_on",
    ),
    Mutation(
        "control starts the same whatever the episode",
        "lm_envs/env/rollout.py",
        "rng.RESET, first_episode, 2**31)",
        "rng.RESET, 0, 2**31)",
        "tests/lm_envs/env/test_exact_infos.py::test_a_collectors_numbers_returns_and_steps",
    ),
    Mutation(
        "a seed's high half is forgotten",
        "lm_envs/rng.py",
        "(seed & 0xFFFFFFFF, seed >> 32)",
        "(seed & 0xFFFFFFFF, 0)",
        "tests/lm_envs/test_rng.py",
    ),
    Mutation(
        "a judge's parameters are added to the usual ones",
        "lm_envs/reward/judge.py",
        "few if self.parameters is None else self.parameters",
        "few | dict(self.parameters or {})",
        "tests/lm_envs/reward/test_judge.py::test_parameters_of_ones_own_replace_all",
    ),
    Mutation(
        "a scaled reward inside a dense sum is not clipped before the end",
        "lm_envs/reward/base.py",
        "return Clip(dense_part(reward.reward), reward.low, reward.high)",
        "return dense_part(reward.reward)",
        "tests/lm_envs/reward/test_base.py::test_the_part_of_a_composition_that_pays_before_the_end",
    ),
    # Rewards and masks
    Mutation(
        "the KL penalty is clamped at 0, step path",
        "lm_envs/env/vector.py",
        "rewards[rows] -= kl_penalty(self.mdp.charged_kl_coef, np.nan_to_num(reported[rows], nan=0.0), reference)",
        "rewards[rows] -= kl_penalty(self.mdp.kl_coef, np.nan_to_num(reported[rows], nan=0.0), reference).clip(0)",
        TEXT_ENV,
    ),
    Mutation(
        "the KL penalty is clamped at 0, bulk path",
        "lm_envs/env/rollout.py",
        "reward = score - kl_penalty(mdp.charged_kl_coef, logprob, ref_logprob)",
        "reward = score - kl_penalty(mdp.charged_kl_coef, logprob, ref_logprob).clamp(min=0)",
        ROLLOUT,
    ),
    Mutation(
        "the KL penalty has the other sign",
        "lm_envs/env/mdp.py",
        "return kl_coef * (logprob - ref_logprob)",
        "return kl_coef * (ref_logprob - logprob)",
        TEXT_ENV,
    ),
    Mutation(
        "a penalty in the loss is charged in the reward too",
        "lm_envs/env/mdp.py",
        "return self.kl_coef if self.kl_in_reward else 0.0",
        "return self.kl_coef",
        KL_COEF,
    ),
    Mutation(
        "an algorithm's published coefficient comes before the env's option",
        "algos/engine/kl_coefficient.py",
        "coef = given.pop() if given else default",
        "coef = default if self.published is not None or not given else given.pop()",
        KL_COEF,
    ),
    Mutation(
        "an agent and an env may disagree about the KL coefficient",
        "algos/engine/kl_coefficient.py",
        "if len(given) > 1:",
        "if len(given) > 2:",
        KL_COEF,
    ),
    Mutation(
        "config.json records the KL coefficient of the measuring env",
        "benchmarks/run/problems.py",
        '{"kl_coef": self.kl_coef, "kl_in_reward": charged}',
        '{"kl_coef": mdp.kl_coef, "kl_in_reward": charged}',
        KL_COEF,
    ),
    Mutation(
        "columns are those of the first prompt with the same tokens",
        "lm_envs/env/mdp.py",
        "[values[i] for i in index.tolist()]",
        "[values[list(self.prompts).index(self.prompts[i])] for i in index.tolist()]",
        COLUMNS,
    ),
    Mutation(
        "a row keeps its first episode's prompt index",
        "lm_envs/env/rows.py",
        "self._prompt_index[rows] = self.mdp.prompt_index(self._seed, episodes)",
        "self._prompt_index[rows] = self.mdp.prompt_index(self._seed, rows.nonzero()[0])",
        COLUMNS,
    ),
    Mutation(
        "a row keeps the reference's log-probabilities of its last episode",
        "lm_envs/env/rows.py",
        "self._logprob[rows] = self._ref_logprob[rows] = np.nan",
        "self._logprob[rows] = np.nan",
        TEXT_ENV,
    ),
    Mutation(
        "uniforms have 32 random bits",
        "lm_envs/rng.py",
        "bits = ((word[0] << _HALF) | word[1]) >> np.uint64(11)",
        "bits = (word[0] << _HALF) >> np.uint64(11)",
        "tests/lm_envs/test_rng.py",
    ),
    Mutation(
        "A2C averages entropy over padding",
        "algos/engine/policy_gradient.py",
        "entropy = masked_mean(now.entropy, mask)",
        "entropy = now.entropy.mean()",
        AGENT + "::test_entropy_is_a_mean_over_real_tokens",
    ),
    Mutation(
        "each epoch has the same minibatches",
        "algos/engine/batching.py",
        "np.random.default_rng((config.seed, iteration, epoch))",
        "np.random.default_rng((config.seed, iteration))",
        AGENT + "::test_each_epoch_and_each_iteration_cuts_other_minibatches",
    ),
    Mutation(
        "a sample that drops rows is counted by what is left",
        "algos/engine/sampling.py",
        "if self.rows not in (0, len(traj)):",
        "if self.rows < 0:",
        CAPABILITIES,
    ),
    Mutation(
        "a batch that is partly left out passes for a full one",
        "algos/engine/sampling.py",
        "wanted = wanted or len(traj)",
        "wanted = wanted or len(kept[0])",
        SELECT,
    ),
    Mutation(
        "what is missing is sampled again as a whole batch",
        "algos/engine/agent.py",
        "config = self.config if self.missing is None else replace(self.config, episodes=self.missing)",
        "config = self.config",
        SELECT,
    ),
    Mutation(
        "rows that other weights sampled pass for fresh ones",
        "algos/engine/agent.py",
        "bool((traj.sampled_by == self._weights).all())",
        "bool((traj.sampled_by == self._weights).any())",
        CAPABILITIES,
    ),
    Mutation(
        "a sum's part that pays once is paid at every step",
        "lm_envs/reward/base.py",
        "for weight, part in reward.parts if is_dense(part)])",
        "for weight, part in reward.parts])",
        ROLLOUT,
    ),
    Mutation(
        "the score lands one action early",
        "lm_envs/env/mdp.py",
        "per_token[rows, lengths - 1] = raw",
        "per_token[rows, np.maximum(lengths - 2, 0)] = raw",
        f"{TEXT_ENV} {ROLLOUT}",
    ),
    Mutation(
        "EOS is no action of the policy",
        "algos/policies/language_model.py",
        "prompt, mask = self._conditioned(prompt), response >= 0",
        "prompt, mask = self._conditioned(prompt), (response >= 0) & (response != self.eos_token_id)",
        f"{ROLLOUT} {AGENT}::test_law_7_the_ratio_is_one_and_the_sampled_logprob_is_the_policys",
    ),
    Mutation(
        "a missing EOS pays instead of costing",
        "lm_envs/env/mdp.py",
        "per_token[rows[cut], lengths[cut] - 1] -= amount",
        "per_token[rows[cut], lengths[cut] - 1] += amount",
        TEXT_ENV,
    ),
    Mutation(
        "replacing the score of a missing EOS adds to it",
        "lm_envs/env/mdp.py",
        "per_token[cut] = 0.0\n                per_token[rows[cut], lengths[cut] - 1] = amount",
        "per_token[rows[cut], lengths[cut] - 1] += amount",
        TEXT_ENV,
    ),
    Mutation(
        "the response loses its EOS before it is scored",
        "lm_envs/env/vector.py",
        "behind = np.cumsum(ends, axis=1) - ends > 0",
        "behind = np.cumsum(ends, axis=1) > 0",
        f"{TEXT_ENV} {ROLLOUT}",
    ),
    Mutation(
        "padding is cleaned by a product, which keeps NaN",
        "algos/ops/advantages.py",
        "return torch.where(mask, x, torch.full_like(x, fill))",
        "return x * mask + fill * ~mask",
        f"{LOSSES} {ADVANTAGES}",
    ),
    Mutation(
        "left padding counts positions from the first column",
        "lm_envs/model/tokens.py",
        '"position_ids": (present.cumsum(dim=1) - 1).clamp(min=0),',
        '"position_ids": (present * 0 + 1).cumsum(dim=1) - 1,',
        f"{ROLLOUT} {FAMILIES}::test_law_4_padding_changes_no_logprob",
    ),
    # Models of one's own
    Mutation(
        "only the first of several EOS ends a response",
        "lm_envs/model/tokens.py",
        "found = found | (tokens == other)",
        "found = found | (tokens == first)",
        ENDINGS,
    ),
    Mutation(
        "only the first of several EOS is masked early",
        "lm_envs/model/decoding.py",
        "for token in eos_ids(eos_token_id):",
        "for token in eos_ids(eos_token_id)[:1]:",
        ENDINGS,
    ),
    Mutation(
        "a chat gets a BOS that its template does not write",
        "lm_envs/model/text.py",
        "start = before if chat else self._one_bos([*lead, *before])",
        "start = self._one_bos([*lead, *before])",
        f"{ENDINGS}::test_one_bos",
    ),
    # Text and ids, and the user's data
    Mutation(
        "a response is decoded without its prompt",
        "lm_envs/model/text.py",
        "        if self.apart:\n            return heads",
        "        if heads:\n            return heads",
        TEXT,
    ),
    Mutation(
        "what a response adds is cut where the prompt alone ends",
        "lm_envs/model/text.py",
        "heads = [head if text.startswith(head) else os.path.commonprefix([head, text]) for head, text in pairs]",
        "pass",
        TEXT,
    ),
    Mutation(
        "a completion that a token joins to its prompt is encoded alone",
        "lm_envs/model/text.py",
        "for anchor in _ANCHORS:",
        "for anchor in ():",
        TEXT,
    ),
    Mutation(
        "what a template writes behind a turn is learned",
        "lm_envs/model/text.py",
        "return [*row[:stop], *(row[stop : stop + 1] or ends[:1])]",
        "return [*row, *ends[:1]]",
        f"{TEXT} {TOKENIZING}",
    ),
    Mutation(
        "a text that spells out its BOS gets two",
        "lm_envs/model/text.py",
        "while bos is not None and ids[:2] == [bos, bos]:",
        "while False:",
        TEXT,
    ),
    Mutation(
        "an encoder gets its text without the EOS",
        "lm_envs/model/text.py",
        "if self.apart and start[-1:] != behind[-1:]:",
        "if False:",
        TEXT,
    ),
    Mutation(
        "a chat's answer is learned behind another prompt than is given",
        "lm_envs/model/chat.py",
        "head = render_messages(tokenizer, prompt, add_generation_prompt=True)",
        "head = render_messages(tokenizer, prompt, add_generation_prompt=False)",
        f"{TEXT} {SAME_IDS}",
    ),
    Mutation(
        "a reward model is trained on special tokens that it will not see",
        "lm_envs/data/packed.py",
        'texts = map("".join, zip(*codec.decode([prompt] * len(rows), rows), strict=True))',
        "texts = codec.tokenizer.batch_decode([prompt + row for row in rows])",
        f"{TOKENIZING} {SAME_IDS}",
    ),
    Mutation(
        "a completion that is labelled false is imitated",
        "lm_envs/data/dataset.py",
        'if example.label == 0 and self.kind == "demonstrations":',
        "if False:",
        DATASET,
    ),
    Mutation(
        "half a surrogate pair is a letter",
        "lm_envs/data/dataset.py",
        "        check_letters(row)\n",
        "",
        DATASET,
    ),
    Mutation(
        "messages that are written as text are prompts as they stand",
        "lm_envs/data/conventions.py",
        'if start[:1] not in ("[", "{"):',
        "if True:",
        DATASET,
    ),
    Mutation(
        "the cells of a CSV file in a folder are numbers and gaps",
        "lm_envs/data/sources.py",
        'if hasattr(builder.config, "keep_default_na"):',
        "if False:",
        DATASET,
    ),
    Mutation(
        "a line separator in a text ends its line",
        "lm_envs/data/sources.py",
        "for number, raw in enumerate(stream, 1):",
        'for number, raw in enumerate(map(str.encode, stream.read().decode(errors="replace").splitlines()), 1):',
        DATASET,
    ),
    Mutation(
        "a line separator in a sample ends its record",
        "benchmarks/run/storage.py",
        'errors="replace").split("\\n")',
        'errors="replace").splitlines()',
        "tests/benchmarks/run/test_storage.py",
    ),
    Mutation(
        "a file is known by its name",
        "benchmarks/run/data_problem.py",
        "sources.fingerprint(self.spec.data)",
        "self.spec.data",
        f"{LEARN}::test_a_corrected_file_is_read_again",
    ),
    Mutation(
        "the log-probabilities of another reference are kept",
        "lm_envs/data/packed.py",
        'f"reference-{key[:20]}"',
        'f"reference-{len(key)}"',
        f"{LEARN}::test_kept_log_probabilities_are_those_of_the_references_weights",
    ),
    Mutation(
        "held-out pairs are trained on",
        "lm_envs/data/packed.py",
        "return self.rows(~held), self.rows(held)",
        "return self, self.rows(held)",
        TOKENIZING,
    ),
    Mutation(
        "which prompts are held out depends on their order",
        "lm_envs/data/packed.py",
        "held = np.isin(shares, prompts[:count])",
        "held = np.arange(len(shares)) < count",
        TOKENIZING,
    ),
    Mutation(
        "a reference of another vocabulary will do if it has as many words",
        "lm_envs/tasks/custom.py",
        "if mine[i] != other[i]):",
        "if mine[i] is None):",
        "tests/lm_envs/tasks/test_custom.py",
    ),
    Mutation(
        "the end of a chat's turn is not asked for",
        "lm_envs/model/endings.py",
        "end_of_turn(tokenizer) if chat else None",
        "None",
        f"{ENDINGS}::test_eos_are_the_tokenizers_the_turns_and_the_configs",
    ),
    Mutation(
        "a layer with a state and keys moves only its keys to another row",
        "lm_envs/model/kv_cache.py",
        "        super().put(rows, other)\n        for x, new in zip(self._states(), other._states(), strict=True):\n"
        "            x[rows] = new",
        "        super().put(rows, other)",
        f"{FAMILIES}::test_the_decoder_under_any_use_is_the_model",
    ),
    Mutation(
        "adapters come with a base of their own",
        "lm_envs/model/adapters.py",
        "model: Any = sharing(base, () if trained_bias else base.parameters())",
        "model: Any = copy.deepcopy(base)",
        f"{MODELS}::test_adapters_are_the_policy_and_share_their_base",
    ),
    Mutation(
        "further training trains the base of the adapters too",
        "algos/policies/adaptation.py",
        "return _frozen(start, [p for p in start.parameters() if id(p) not in own])",
        "return _frozen(start, [])",
        f"{MODELS}::test_adapters_are_trained_further_and_the_base_is_not",
    ),
    Mutation(
        "a step is taken on the bfloat16 weight",
        "algos/engine/optimizer.py",
        "master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))",
        "master.copy_(p.float())",
        "tests/algos/engine/test_optimizer.py::test_small_steps_add_up",
    ),
    Mutation(
        "a model that reads padding passes the trial",
        "lm_envs/model/checking.py",
        "gap = max(_padding(model, texts, expected))",
        "gap = 0.0",
        "tests/lm_envs/model/test_checking.py::test_recurrences_that_read_padding_are_refused",
    ),
    # Advantages
    Mutation(
        "whitening counts padding",
        "algos/ops/advantages.py",
        "count = mask.sum().clamp(min=1)\n    mean",
        "count = torch.tensor(mask.numel())\n    mean",
        ADVANTAGES,
    ),
    Mutation(
        "whitening divides by the sample variance",
        "algos/ops/advantages.py",
        "(centred**2).sum() / count + _EPS",
        "(centred**2).sum() / (count - 1) + _EPS",
        ADVANTAGES,
    ),
    Mutation(
        "whitening comes before the value's target",
        "algos/engine/policy_gradient.py",
        "            advantage = adv.whiten(advantage, traj.mask)\n",
        "            advantage = adv.whiten(advantage, traj.mask)\n        target = advantage + before.value[:, :-1]\n",
        "tests/algos/test_ppo_variants.py",
    ),
    Mutation(
        "GAE forgets lambda",
        "algos/ops/advantages.py",
        "return discounted_returns(delta, mask, gamma * lam)",
        "return discounted_returns(delta, mask, gamma)",
        ADVANTAGES,
    ),
    Mutation(
        "truncation is worth nothing",
        "algos/ops/advantages.py",
        "return value.gather(1, mask.sum(dim=1, keepdim=True)).squeeze(1)",
        "return torch.zeros_like(value[:, 0])",
        ADVANTAGES,
    ),
    Mutation(
        "termination bootstraps",
        "algos/policies/mlp.py",
        "cut = traj.truncated\n",
        "cut = torch.ones_like(traj.truncated)\n",
        "tests/algos/policies/test_mlp.py",
    ),
    Mutation(
        "the value is read one token late",
        "lm_envs/model/forwards.py",
        "ResponseForward(seen[0][:, -steps:]",
        "ResponseForward(seen[0][:, -steps:].roll(-1, 1)",
        ROLLOUT,
    ),
    Mutation(
        "the value head starts anywhere",
        "algos/policies/language_model.py",
        "nn.init.zeros_(head.weight)",
        "nn.init.ones_(head.weight)",
        CRITICS,
    ),
    Mutation(
        "the reward model's critic is read one token late",
        "algos/policies/critics.py",
        "self.model.score(hidden), self.label",
        "self.model.score(hidden.roll(-1, 1)), self.label",
        CRITICS,
    ),
    Mutation(
        "the reward model's critic is in other units",
        "algos/policies/critics.py",
        "return (score - mean) / std",
        "return score",
        CRITICS,
    ),
    Mutation(
        "the group's baseline includes the episode itself",
        "algos/ops/advantages.py",
        "return (sums - x) / (sizes - 1)",
        "return sums / sizes",
        ADVANTAGES,
    ),
    Mutation(
        "the running mean includes the present batch",
        "algos/reinforce.py",
        "baseline = self._mean / self._weight if self._weight else 0.0\n"
        "            mean = float(adv.masked(signal, traj.mask).sum() / traj.mask.sum())\n"
        "            self._mean, self._weight = adv.running_mean(self._mean, self._weight, mean, "
        "config.baseline_decay)\n",
        "mean = float(adv.masked(signal, traj.mask).sum() / traj.mask.sum())\n"
        "            self._mean, self._weight = adv.running_mean(self._mean, self._weight, mean, "
        "config.baseline_decay)\n"
        "            baseline = self._mean / self._weight\n",
        ALGORITHMS + "::test_the_running_mean_is_of_past_batches_only",
    ),
    # Losses and the update
    Mutation(
        "advantages lose their sign",
        "algos/ops/losses.py",
        "return -masked(advantage, mask) * masked(logprob, mask)",
        "return -masked(advantage, mask).abs() * masked(logprob, mask)",
        LOSSES,
    ),
    Mutation(
        "PPO takes the better of the two",
        "algos/ops/losses.py",
        "return torch.maximum(-advantage * ratio,",
        "return torch.minimum(-advantage * ratio,",
        LOSSES,
    ),
    Mutation(
        "PPO's clip is wider above",
        "algos/ops/losses.py",
        "1 + (clip if clip_high is None else clip_high))\n    return torch.maximum(",
        "1 + 2 * (clip if clip_high is None else clip_high))\n    return torch.maximum(",
        LOSSES,
    ),
    Mutation(
        "the clipped value loss takes the better of the two",
        "algos/ops/losses.py",
        "error = torch.maximum(error,",
        "error = torch.minimum(error,",
        LOSSES,
    ),
    Mutation(
        "the ratio is off by one token",
        "algos/ppo.py",
        '"old_logprob": before.logprob,',
        '"old_logprob": before.logprob.roll(1, 1),',
        AGENT + "::test_law_7_the_ratio_is_one_and_the_sampled_logprob_is_the_policys",
    ),
    Mutation(
        "the early stop never stops",
        "algos/ppo.py",
        'return self.config.kl_stop is not None and metrics["approx_kl"] > self.config.kl_stop',
        "return False",
        AGENT + "::test_kl_stop_leaves_the_batch_before_the_step",
    ),
    Mutation(
        "PPO-KLPEN penalises the other direction",
        "algos/ops/losses.py",
        "coef * k3(old_logprob, logprob, mask)",
        "coef * k3(logprob, old_logprob, mask)",
        VARIANTS,
    ),
    Mutation(
        "PPO-KLPEN's weight moves the wrong way",
        "algos/ppo_klpen.py",
        "return coef * 2 if kl > target * 1.5 else coef",
        "return coef / 2 if kl > target * 1.5 else coef",
        VARIANTS,
    ),
    Mutation(
        "a batch's loss is a mean of means",
        "algos/engine/agent.py",
        "yield loss * (weight * (count / whole)",
        "yield loss * (weight * (len(part) / len(traj))",
        AGENT + "::test_law_8_the_micro_batch_size_does_not_change_the_gradient",
    ),
    Mutation(
        "a minibatch splits groups",
        "algos/engine/batching.py",
        "parts = [np.flatnonzero(np.isin(inverse.cpu().numpy(), chosen)) for chosen in order]",
        "parts = np.array_split(rng.permutation(len(traj)), count)",
        AGENT + "::test_minibatches_cover_every_row_once_and_keep_groups_whole",
    ),
    Mutation(
        "the update forgets the temperature",
        "algos/policies/language_model.py",
        "response.clamp(min=0), temperature=self.temperature, mask=mask",
        "response.clamp(min=0), temperature=1.0, mask=mask",
        ROLLOUT,
    ),
    Mutation(
        "the update forgets the action mask",
        "algos/policies/language_model.py",
        "forward = response_forward(self.model, prompt, response, exclude)",
        "forward = response_forward(self.model, prompt, response)",
        ROLLOUT,
    ),
    Mutation(
        "the reference forgets the temperature",
        "lm_envs/model/forwards.py",
        "given.clamp(min=0), temperature=temperature, mask=mask",
        "given.clamp(min=0), temperature=1.0, mask=mask",
        ROLLOUT,
    ),
    Mutation(
        "dropout is on while training",
        "algos/policies/language_model.py",
        "return super().train(False)",
        "return super().train(mode)",
        AGENT + "::test_dropout_stays_off_in_every_forward",
    ),
    Mutation(
        "the learning rate does not fall",
        "algos/engine/agent.py",
        "left = 1 - done if self.config.anneal else 1.0",
        "left = 1.0",
        AGENT + "::test_learning_rate_falls_to_zero_over_the_iterations",
    ),
    Mutation(
        "Adam's epsilon is PyTorch's",
        "algos/engine/agent.py",
        "self.config.learning_rate, self.config.adam_eps)",
        "self.config.learning_rate, 1e-8)",
        ALGORITHMS + "::test_no_setting_is_dead",
    ),
    Mutation(
        "every pass over the data has the order of the first",
        "lm_envs/training.py",
        "np.random.default_rng((seed, held))",
        "np.random.default_rng((seed, 0))",
        "tests/lm_envs/test_training.py",
    ),
    Mutation(
        "gradients are not clipped",
        "lm_envs/training.py",
        "nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)",
        "nn.utils.clip_grads_with_norm_(parameters, 1e9, norm)",
        ALGORITHMS + "::test_no_setting_is_dead",
    ),
    Mutation(
        "the adaptive controller counts nats per token",
        "algos/engine/agent.py",
        'self._kl.steer(metrics["kl"])',
        'self._kl.steer(metrics["kl"] / metrics["length"])',
        AGENT + "::test_the_controllers_kl_is_in_nats_per_sequence",
    ),
    Mutation(
        "the adaptive controller's error is not clipped",
        "algos/engine/kl_coefficient.py",
        "self.gain * min(max(error, -0.5), 1.0)",
        "self.gain * error",
        "tests/algos/engine/test_kl_control.py",
    ),
    Mutation(
        "the demonstrations' weight is ignored",
        "algos/engine/agent.py",
        "yield loss * (weight * (count / whole)",
        "yield loss * ((count / whole)",
        "tests/algos/engine/test_demonstrations.py",
    ),
    Mutation(
        "REINFORCE's likelihood term is a mean over tokens",
        "algos/engine/demonstrations.py",
        'mean = masked_mean if unit == "token" else sequence_mean',
        "mean = masked_mean",
        "tests/algos/engine/test_demonstrations.py",
    ),
    # KL in the loss
    Mutation(
        "k2 forgets the half",
        "algos/ops/losses.py",
        "return 0.5 * k1(logprob, ref_logprob, mask) ** 2",
        "return k1(logprob, ref_logprob, mask) ** 2",
        LOSSES,
    ),
    Mutation(
        "k3 is of the other ratio",
        "algos/ops/losses.py",
        "return torch.expm1(-log_ratio) + log_ratio",
        "return torch.expm1(log_ratio) - log_ratio",
        LOSSES,
    ),
    Mutation(
        "the penalty is charged in the reward and in the loss",
        "algos/engine/policy_gradient.py",
        "return self.config.kl_loss is None",
        "return True",
        GRADIENT,
    ),
    # Algorithms
    Mutation(
        "GRPO does not divide by the standard deviation",
        "algos/grpo.py",
        " / (adv.group_std(returns, group) + EPS)",
        "",
        GROUPS,
    ),
    Mutation(
        "GRPO does not divide by the length",
        "algos/ops/losses.py",
        '"response": each / lengths,',
        '"response": each,',
        LOSSES,
    ),
    Mutation(
        "Dr. GRPO divides by the length",
        "algos/dr_grpo.py",
        'loss_mean: LossMean = "sum"',
        'loss_mean: LossMean = "response"',
        GROUPS,
    ),
    Mutation(
        "each minibatch is a mean of its own",
        "algos/engine/agent.py",
        "if self.whole_batch else None",
        "if False else None",
        FAMILY,
    ),
    Mutation(
        "the mean over tokens is of each response",
        "algos/ops/losses.py",
        '"token": each / lengths.mean()',
        '"token": each / lengths',
        LOSSES,
    ),
    Mutation(
        "the higher clip is the lower one",
        "algos/ops/losses.py",
        "bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))\n    return torch.maximum(",
        "bounded = ratio.clamp(1 - clip, 1 + clip)\n    return torch.maximum(",
        LOSSES,
    ),
    Mutation(
        "GSPO's ratio is that of the sum",
        "algos/ops/losses.py",
        "log_ratio.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)",
        "log_ratio.sum(dim=1, keepdim=True)",
        LOSSES,
    ),
    Mutation(
        "GSPO by token keeps the sequence's gradient",
        "algos/ops/losses.py",
        "ratio = ratio.detach() * importance_ratio(logprob, logprob.detach(), mask)",
        "ratio = ratio.expand(mask.shape)",
        LOSSES,
    ),
    Mutation(
        "CISPO's weight has a gradient",
        "algos/ops/losses.py",
        "ratio = importance_ratio(logprob, old_logprob, mask).detach()",
        "ratio = importance_ratio(logprob, old_logprob, mask)",
        LOSSES,
    ),
    Mutation(
        "SAPO's gate does not divide by the temperature",
        "algos/ops/losses.py",
        "return -advantage * 4 / taus * torch",
        "return -advantage * 4 * torch",
        LOSSES,
    ),
    Mutation(
        "SAPO has one temperature for both signs",
        "algos/ops/losses.py",
        "tau + (tau_negative - tau) * (advantage < 0)",
        "tau + 0 * (advantage < 0)",
        LOSSES,
    ),
    Mutation(
        "J-BOND punishes a response below one sample",
        "algos/bond.py",
        "traj.score.cpu() < score.amin(dim=1)",
        "traj.score.cpu() < score.amax(dim=1)",
        BOND,
    ),
    Mutation(
        "J-BOND imitates the worse sample",
        "algos/bond.py",
        "score.argmax(dim=1)]",
        "score.argmin(dim=1)]",
        BOND,
    ),
    Mutation(
        "J-BOND's anchor stays",
        "algos/bond.py",
        "at_least_float32(p.detach()), config.anchor_rate)",
        "at_least_float32(p.detach()), 0.0)",
        BOND,
    ),
    Mutation(
        "the optimum as a teacher is the reference",
        "algos/distillation.py",
        "return TabularPolicy(exact, exact.optimal_policy)",
        "return TabularPolicy(exact)",
        DISTILLATION,
    ),
    Mutation(
        "what a run left is shown as its start",
        "benchmarks/run/generation.py",
        '{"start": task.start, "tuned": load_policy(place)}',
        '{"tuned": task.start, "start": load_policy(place)}',
        "tests/benchmarks/commands/test_generate.py",
    ),
    Mutation(
        "a trial that collapsed may be chosen",
        "benchmarks/run/tuning.py",
        'if not (told["collapsed"] or math.isnan(told["value"]))',
        'if not math.isnan(told["value"])',
        "tests/benchmarks/run/test_tuning.py",
    ),
    Mutation(
        "distillation as a reward counts the token's own KL",
        "algos/distillation.py",
        "self.config.gamma) - adv.masked(reward, traj.mask)",
        "self.config.gamma)",
        DISTILLATION,
    ),
    Mutation(
        "distillation turns the KL round",
        "algos/distillation.py",
        "now.log_probs(), teacher, traj.mask)",
        "teacher, now.log_probs(), traj.mask)",
        DISTILLATION,
    ),
    Mutation(
        "a teacher of other tokens is taken",
        "algos/distillation.py",
        "if tokenizer.get_vocab() != mdp.task.tokenizer.get_vocab():",
        "if len(tokenizer.get_vocab()) < 0:",
        DISTILLATION,
    ),
    Mutation(
        "a part of the reward counts where it does not apply",
        "lm_envs/reward/base.py",
        "self.seen[part] += values[mine].sum(), mine.sum()",
        "self.seen[part] += values[mine].sum(), len(mine)",
        "tests/lm_envs/reward/test_parts.py",
    ),
    Mutation(
        "the parts of a batch's reward are those of all samples so far",
        "algos/engine/sampling.py",
        "        forget_parts(reward)",
        "        pass",
        "tests/lm_envs/reward/test_parts.py",
    ),
    Mutation(
        "a process reports its own parts of the reward",
        "lm_envs/reward/base.py",
        'np.sum(group.exchange(whole.seen, "the parts of the reward"), axis=0)',
        "whole.seen",
        "tests/lm_envs/reward/test_parts.py",
    ),
    Mutation(
        "XPO's bonus is for the policy's samples",
        "algos/xpo.py",
        ".sum(dim=1)[1::2].mean()",
        ".sum(dim=1)[0::2].mean()",
        XPO,
    ),
    Mutation(
        "XPO prefers the worse sample",
        "algos/xpo.py",
        "[gap[kept] < 0, gap[kept] > 0]",
        "[gap[kept] > 0, gap[kept] < 0]",
        XPO,
    ),
    Mutation(
        "TRPO's step ignores the KL limit",
        "algos/trpo.py",
        "if loss < reached and kl <= limit:",
        "if loss < reached:",
        TRUST,
    ),
    Mutation(
        "TRPO takes a step that is worse",
        "algos/trpo.py",
        "if loss < reached and kl <= limit:",
        "if kl <= limit:",
        TRUST,
    ),
    Mutation(
        "TRPO's step is longer by the square root of two",
        "algos/trpo.py",
        "(2 * limit / (x @ product(x))).sqrt()",
        "(4 * limit / (x @ product(x))).sqrt()",
        TRUST,
    ),
    Mutation(
        "conjugate gradients are steepest descent",
        "algos/ops/conjugate_gradients.py",
        "direction = residual + square / before * direction",
        "direction = residual",
        TRUST,
    ),
    Mutation(
        "the penalty of long responses begins at once",
        "algos/ops/advantages.py",
        "(limit * (1 - share) - lengths)",
        "(limit - limit * share * 1.5 - lengths)",
        FAMILY,
    ),
    Mutation(
        "REINFORCE++ does not subtract the group's mean",
        "algos/reinforce_plus_plus.py",
        "return returns - adv.group_mean(returns, group)",
        "return returns",
        FAMILY,
    ),
    Mutation(
        "the geometric mask compares the product",
        "algos/ops/losses.py",
        "mean = log_ratio / mask.sum(dim=1, keepdim=True)",
        "mean = log_ratio",
        OFF_POLICY,
    ),
    Mutation(
        "the negative mask drops good responses too",
        "algos/engine/policy_gradient.py",
        'weights if kind != "negative_mask" else torch.where(x < 0, weights, 1.0)',
        "weights",
        OFF_POLICY,
    ),
    Mutation(
        "a corrected reward keeps the sampler's penalty",
        "algos/engine/policy_gradient.py",
        "reward = reward - adv.masked(extra, traj.mask)",
        "reward = reward - 0 * adv.masked(extra, traj.mask)",
        OFF_POLICY,
    ),
    Mutation(
        "corrections carry a gradient",
        "algos/ops/losses.py",
        "log_ratio = k1(logprob, sampler_logprob, mask).detach()",
        "log_ratio = k1(logprob, sampler_logprob, mask)",
        OFF_POLICY,
    ),
    Mutation(
        "masks drop no weights that are too small",
        "algos/ops/losses.py",
        'least = 1 / limit if kind == "token_mask" else 0.0',
        "least = 0.0",
        OFF_POLICY,
    ),
    Mutation(
        "a penalty in the loss is not corrected",
        "algos/engine/policy_gradient.py",
        "return self.corrected(coef * estimate, traj, now)",
        "return coef * estimate",
        OFF_POLICY,
    ),
    Mutation(
        "the sampler's KL is the other direction's",
        "algos/engine/batching.py",
        "tally(k3(traj.logprob, logprob, traj.mask), traj.mask)",
        "tally(k3(logprob, traj.logprob, traj.mask), traj.mask)",
        OFF_POLICY,
    ),
    Mutation(
        "ReMax's greedy responses are free",
        "algos/engine/sampling.py",
        "agent.reward_calls += len(response)",
        "agent.reward_calls += 0",
        FAMILY,
    ),
    Mutation(
        "ReMax's baseline is sampled",
        "algos/policies/base.py",
        "kept, self.temperature = self.temperature, GREEDY",
        "kept, self.temperature = self.temperature, 1.0",
        FAMILY,
    ),
    Mutation(
        "a Q critic's advantage is Q",
        "algos/a2c.py",
        "return masked(_chosen(before, traj) - before.value[:, :-1], traj.mask)",
        "return masked(_chosen(before, traj), traj.mask)",
        CRITICS,
    ),
    Mutation(
        "expert iteration keeps the worst",
        "algos/expert_iteration.py",
        "order = torch.argsort(value, descending=True, stable=True)",
        "order = torch.argsort(value, descending=False, stable=True)",
        ALGORITHMS + "::test_best_of_groups_by_hand",
    ),
    Mutation(
        "best-of-n keeps the worst",
        "algos/best_of_n.py",
        "score.argmax(axis=1)",
        "score.argmin(axis=1)",
        "tests/algos/test_best_of_n.py",
    ),
    Mutation(
        "soft best-of-n forgets the temperature",
        "algos/best_of_n.py",
        "score = score / self.temperature - np.log",
        "score = score - np.log",
        "tests/algos/test_best_of_n.py",
    ),
    Mutation(
        "best-of-n's measured KL is that of its samples alone",
        "algos/best_of_n.py",
        "found.append(float((p * gain.exp() * gain).sum()))",
        "found.append(float((p * gain).sum()))",
        "tests/algos/test_best_of_n.py",
    ),
    Mutation(
        "expert iteration's control looks at the scores",
        "algos/expert_iteration.py",
        "rank = torch.zeros_like(value)",
        "rank = value",
        ALGORITHMS + "::test_what_expert_iteration_keeps",
    ),
    Mutation(
        "Quark's tokens stand for the other end",
        "algos/quark.py",
        "return place * count // len(score)",
        "return count - 1 - place * count // len(score)",
        TOKENS,
    ),
    Mutation(
        "Quark's reference reads the reward token's place",
        "algos/policies/reward_tokens.py",
        "return prompt.masked_fill(prompt >= vocabulary, -1)",
        "return prompt.masked_fill(prompt >= vocabulary, 0)",
        TOKENS,
    ),
    Mutation(
        "reward conditioning samples on the bad sign",
        "algos/reward_conditioning.py",
        "self.policy.condition_on(BETTER)",
        "self.policy.condition_on(WORSE)",
        TOKENS,
    ),
    Mutation(
        "DPO forgets beta",
        "algos/ops/losses.py",
        "return bradley_terry_loss(beta * log_ratio, rank, weight)",
        "return bradley_terry_loss(log_ratio, rank, weight)",
        PREFERENCES,
    ),
    Mutation(
        "DPO's reference drifts with the policy",
        "algos/engine/preference_losses.py",
        "masked(traj.ref_logprob, traj.mask).to(now.logprob.dtype)",
        "masked(now.logprob.detach(), traj.mask)",
        PREFERENCES,
    ),
    Mutation(
        "robust DPO smooths instead of undoing flips",
        "algos/ops/losses.py",
        "+ flip * F.logsigmoid(-margin)) / (1 - 2 * flip)",
        "- flip * F.logsigmoid(-margin)) / (1 - 2 * flip)",
        "tests/algos/engine/test_preference_losses.py::test_pair_losses_by_hand",
    ),
    Mutation(
        "KTO's mismatched responses are the prompts' own",
        "algos/engine/comparisons.py",
        "rows = (torch.arange(len(data)) + len(data) // 2) % len(data)",
        "rows = torch.arange(len(data))",
        "tests/algos/engine/test_preference_losses.py::test_mismatched_rows_by_hand",
    ),
    Mutation(
        "pairs of a large group count for more",
        "lm_envs/training.py",
        "weight[group].to(losses.dtype)) / pairs[group].to(losses.dtype)",
        "weight[group].to(losses.dtype)) + 0 * pairs[group]",
        f"{PREFERENCES} tests/lm_envs/test_training.py",
    ),
    Mutation(
        "the reward head starts with another standard deviation",
        "lm_envs/reward/learned.py",
        "head.weight.normal_(std=(head.in_features + 1) ** -0.5,",
        "head.weight.normal_(std=0.02,",
        "tests/lm_envs/test_training.py",
    ),
    Mutation(
        "Binary FeedME imitates losers",
        "algos/engine/comparisons.py",
        "best = data.select(data.rank == 0)",
        "best = data.select(data.rank != 0)",
        PREFERENCES,
    ),
    Mutation(
        "iterated RLHF forgets earlier rounds' choices",
        "algos/iterated_rlhf.py",
        "self._choices = np.concatenate([self._choices, choices])",
        "self._texts, self._choices = self._texts[-len(choices) :], choices",
        "tests/algos/test_iterated_rlhf.py",
    ),
    # Adapting a language model
    Mutation(
        "frozen weights are copied, not shared",
        "lm_envs/model/adapters.py",
        "return copy.deepcopy(model, {id(p): p for p in shared})",
        "return copy.deepcopy(model)",
        ADAPTATION,
    ),
    Mutation(
        "freezing layers forgets the embeddings",
        "algos/policies/adaptation.py",
        "below.add(id(node.variable))",
        "pass",
        ADAPTATION,
    ),
    Mutation(
        "a reward model reads tokens that its pad id leaves no places for",
        "lm_envs/model/tokens.py",
        "limit - max(skipped, default=0)",
        "limit",
        "tests/lm_envs/reward/test_learned.py",
    ),
    Mutation(
        "a merge leaves the adapters out",
        "lm_envs/model/adapters.py",
        "            module.merge()",
        "            pass",
        f"{SAVED}::test_the_saved_policy_is_the_one_that_was_measured",
    ),
    Mutation(
        "a merge reaches the layer that is tied",
        "lm_envs/model/adapters.py",
        "            _own_weight(found)",
        "            pass",
        f"{SAVED}::test_a_merge_does_not_reach_the_layer_that_is_tied",
    ),
    Mutation(
        "a stage trains the base of the adapters that it was given",
        "benchmarks/run/data_problem.py",
        "if not self.spec.adaptation and not has_adapters(self.model):",
        "if not self.spec.adaptation:",
        SAVED,
    ),
    Mutation(
        "a saved model writes on after the end of its turn",
        "algos/policies/adaptation.py",
        "dict.fromkeys([*ends, *eos_tokens",
        "dict.fromkeys([*eos_tokens",
        f"{SAVED}::test_generate_stops_at_the_end_of_turn_that_was_learned",
    ),
    Mutation(
        "a shared weight is trained",
        "algos/policies/adaptation.py",
        "parameter.requires_grad_(id(parameter) not in shared)",
        "parameter.requires_grad_(True)",
        ADAPTATION,
    ),
    Mutation(
        "LoRA is scaled by the root of its rank",
        "algos/policies/adaptation.py",
        "        r=adaptation.lora_rank,",
        "        r=adaptation.lora_rank, use_rslora=True,",
        ADAPTATION,
    ),
    Mutation(
        "a checkpoint goes on upon any base",
        "algos/engine/agent.py",
        'if counters.get("frozen_sha256") != frozen_hash(self.policy):',
        "if False:",
        ADAPTATION,
    ),
    # Stable-Baselines3
    Mutation(
        "sb3: a text is taken for the prefix of one with another action",
        "algos/other_libraries/network.py",
        ">= end[order[:-1], None]",
        ">= end[order[:-1], None] - 1",
        ACTOR_CRITIC,
    ),
    Mutation(
        "sb3: the wrong log-probability is reported",
        "algos/other_libraries/sb3_env.py",
        "report(self.text_env, actions.logprob)",
        "report(self.text_env, actions.logprob * 0)",
        SB3 + "test_the_exact_penalty_is_charged_and_without_the_report_it_is_not",
    ),
    Mutation(
        "sb3: re-evaluation reads no mask",
        "algos/other_libraries/sb3.py",
        "return _mask(logits, masks), values",
        "return logits, values",
        "tests/algos/other_libraries/test_sb3_masked.py::test_the_mask_is_the_references_top_k_in_action_report_and_penalty",
    ),
    Mutation(
        "sb3: values are of the token before",
        "lm_envs/model/forwards.py",
        "[row, position])",
        "[row, (position - 1).clamp(min=0)])",
        SB3 + "test_evaluate_actions_is_our_policys_evaluation_gradients_too",
    ),
    Mutation(
        "sb3: the terminal observation is the first of the next text",
        "algos/other_libraries/sb3_env.py",
        "final_obs[row],",
        "obs[row],",
        "tests/algos/other_libraries/test_sb3_env.py::test_infos_go_to_the_rows_that_ended",
    ),
    Mutation(
        "sb3: a truncation is not told",
        "algos/other_libraries/sb3_env.py",
        "bool(truncated[row] and not terminated[row])",
        "False",
        "tests/algos/other_libraries/test_sb3_env.py::test_truncation_is_told_and_bootstraps",
    ),
    Mutation(
        "sb3: the hidden states of refilled rows stay the old ones",
        "lm_envs/model/decoding.py",
        "found = tuple(x.index_copy(0, index, f) for f, x in zip(fresh, found, strict=True))",
        "found = (found[0].index_copy(0, index, fresh[0]), *found[1:])",
        SB3 + "test_cached_steps_are_teacher_forced_ones_whatever_happens_to_rows",
    ),
    Mutation(
        "the mask holds the least likely tokens of the reference",
        "lm_envs/model/decoding.py",
        "values.topk(k).indices",
        "(-values).topk(k).indices",
        "tests/algos/other_libraries/test_sb3_masked.py::test_the_mask_belongs_to_the_state_in_every_autoreset_mode",
    ),
    # Decoding at speed
    Mutation(
        "a decoder takes any change for one more token",
        "lm_envs/model/decoding.py",
        "if not (torch.equal(expected, obs) and bool((last >= 0).all())):",
        "if not bool((last >= 0).all()):",
        "tests/lm_envs/model/test_decoding.py",
    ),
    Mutation(
        "a uniform number next to 1 hits a token without probability",
        "lm_envs/model/decoding.py",
        "return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))",
        "return target",
        "tests/lm_envs/model/test_decoding.py",
    ),
    Mutation(
        "a program's buffers keep the places of the last prompts",
        "lm_envs/model/compiled.py",
        "self.positions[:count, 0] = prompts.lengths",
        "pass",
        "tests/lm_envs/model/test_compiled.py::test_fixed_shapes_sample_what_growing_ones_do",
    ),
    Mutation(
        "a minibatch that is cut by length loses its longest rows",
        "algos/engine/batching.py",
        "return list(rows.split(most))",
        "return list(rows[:-1].split(most))",
        "tests/algos/engine/test_spared.py",
    ),
    # A network for other libraries
    Mutation(
        "a state is read before its last token",
        "algos/other_libraries/network.py",
        "picked_logits(policy.model, prompt, response, row, position)",
        "picked_logits(policy.model, prompt, response, row, (position - 1).clamp(min=0))",
        ACTOR_CRITIC,
    ),
    Mutation(
        "a shorter prompt counts as the beginning of a longer one",
        "algos/other_libraries/network.py",
        "((ordered[:-1] == ordered[1:]) | behind)",
        "((ordered[:-1] == ordered[1:]) | behind | (ordered[:-1] < 0))",
        ACTOR_CRITIC,
    ),
    Mutation(
        "logits are not divided by the temperature",
        "algos/other_libraries/network.py",
        "logits = scaled(logits, self.policy.temperature)",
        "logits = scaled(logits)",
        ACTOR_CRITIC,
    ),
    # What a comparison publishes
    Mutation(
        "the final evaluation is on training prompts",
        "benchmarks/run/problems.py",
        "env, count = self._measure(self.spec.plan.split), self.spec.plan.test_prompts",
        'env, count = self._measure("train"), self.spec.plan.test_prompts',
        RECOMPUTED,
    ),
    Mutation(
        "the learning curve is on test prompts",
        "benchmarks/run/problems.py",
        'env, count = self._measure("validation"), self.spec',
        'env, count = self._measure("test"), self.spec',
        RECOMPUTED,
    ),
    Mutation(
        "evaluation begins again with the first prompts after each chunk",
        "benchmarks/measure/samples.py",
        "first_episode=first, seed=seed)",
        "first_episode=0, seed=seed)",
        RECOMPUTED,
    ),
    Mutation(
        "inference tokens are not charged",
        "algos/engine/cost.py",
        'tokens_generated=measured["inference_tokens"]',
        "tokens_generated=0",
        f"{COST} {RECOMPUTED}::test_costs_are_what_was_sampled_and_scored",
    ),
    Mutation(
        "inference reward calls are not charged",
        "algos/engine/cost.py",
        'reward_calls=measured["inference_reward_calls"]',
        "reward_calls=0",
        f"{COST} {RECOMPUTED}::test_costs_are_what_was_sampled_and_scored",
    ),
    Mutation(
        "a resumed run forgets the time before",
        "benchmarks/run/one_run.py",
        'self.wall_s = found.state["wall_s"]',
        "self.wall_s = 0.0",
        RECOMPUTED,
    ),
    Mutation(
        "a budget of episodes is rounded down",
        "benchmarks/run/problems.py",
        "math.ceil(most / config.episodes)",
        "math.floor(most / config.episodes)",
        RECOMPUTED,
    ),
    Mutation(
        "the table's win-rate error forgets the seeds",
        "benchmarks/run/results.py",
        "estimates = {name: estimate_of(rows, outcomes(rows, name)) for name in PER_PROMPT}",
        "estimates = {name: estimate_of(rows[:1], outcomes(rows, name).mean(0)[None]) for name in PER_PROMPT}",
        "tests/benchmarks/test_recomputed_report.py",
    ),
    Mutation(
        "methods are called better one pair at a time",
        "benchmarks/run/aggregate.py",
        "adjusted = statistics.holm([each.estimate.p for each in found], _shares(pairs))",
        "adjusted = [each.estimate.p for each in found]",
        "tests/benchmarks/measure/test_statistics.py::test_equal_methods_are_hardly_ever_called_better",
    ),
    Mutation(
        "a budget of tokens lowers the step size by iterations",
        "benchmarks/run/one_run.py",
        "agent.progress = self.budget.spent(self.wall_s)",
        "agent.progress = None",
        "tests/benchmarks/run/test_budgets.py",
    ),
    Mutation(
        "a curve is read off at its last point before a KL",
        "benchmarks/run/matched.py",
        "share = (here - below) / (above - below)",
        "share = 0.0",
        "tests/benchmarks/run/test_matched.py",
    ),
    Mutation(
        "all seeds are tested with the same random numbers",
        "benchmarks/run/problems.py",
        "self.policy, count, self.spec.seed)",
        "self.policy, count, 0)",
        RECOMPUTED,
    ),
    Mutation(
        "SFT is compared with its own samples",
        "benchmarks/measure/samples.py",
        "return sample(env, policy, count, _REFERENCE_SEED)",
        "return sample(env, policy, count, _POLICY_SEED)",
        RECOMPUTED,
    ),
    Mutation(
        "proxy is the judge's score",
        "benchmarks/measure/samples.py",
        "proxy=traj.score.double().numpy()",
        "proxy=gold",
        RECOMPUTED,
    ),
    Mutation(
        "given comparisons cost nothing",
        "algos/registry.py",
        "    agent.given = of_preferences(data)\n",
        "",
        COST,
    ),
    Mutation(
        "the comparisons behind a reward model cost nothing",
        "benchmarks/run/problems.py",
        "return found + cost.of_reward(self.task) if uses_reward else found",
        "return found",
        COST,
    ),
    Mutation(
        "iterated RLHF's pairs are not charged",
        "algos/iterated_rlhf.py",
        "        self.tokens_done += fresh.tokens + held.tokens\n",
        "",
        COST,
    ),
    Mutation(
        "a second pass over a batch is free",
        "algos/engine/agent.py",
        "        self.trained_tokens += int(traj.response_lengths.sum())\n",
        "        self.trained_tokens += int(traj.response_lengths.sum()) // self.config.epochs\n",
        COST,
    ),
    Mutation(
        "a tie is a win",
        "benchmarks/measure/samples.py",
        "0.5 + 0.5 * np.sign(gold - reference)",
        "np.float64(gold >= reference)",
        SAMPLES,
    ),
    Mutation(
        "standard errors divide by n",
        "benchmarks/measure/samples.py",
        "values.std(ddof=1) / math.sqrt",
        "values.std() / math.sqrt",
        SAMPLES,
    ),
    Mutation(
        "the judge's share of positives has the reward's threshold",
        "benchmarks/measure/samples.py",
        'positive_rate(found.gold, (stats or {}).get("judge_threshold"))',
        'positive_rate(found.gold, (stats or {}).get("reward_threshold"))',
        SAMPLES,
    ),
    Mutation(
        "gold's error is that of the proxy",
        "benchmarks/measure/samples.py",
        '"gold_se": standard_error(found.gold)',
        '"gold_se": standard_error(found.proxy)',
        f"{REPORTED}::test_errors_and_shares",
    ),
    Mutation(
        "distinct-2 is a mean over responses",
        "benchmarks/measure/samples.py",
        "return len(set(pairs)) / len(pairs) if pairs else math.nan",
        "rows = [set(zip(r[:-1], r[1:])) for r in tokens if len(r) > 1]\n"
        "    return sum(map(len, rows)) / len(pairs) if pairs else math.nan",
        SAMPLES,
    ),
    Mutation(
        "best-of-n chooses by gold",
        "benchmarks/run/problems.py",
        "self.policy = BestOfN(start, mdp, n, temperature)",
        "judged = replace(self.task, reward=self.task.judge)\n"
        "            self.policy = BestOfN(start, samples.evaluation_env(judged, 'test').mdp, n, temperature)",
        RECOMPUTED,
    ),
    Mutation(
        "validation counts the test's prompts",
        "benchmarks/run/problems.py",
        "self.spec.plan.validation_prompts\n",
        "self.spec.plan.test_prompts\n",
        RECOMPUTED,
    ),
    Mutation(
        "all seeds train with the same random numbers",
        "benchmarks/run/problems.py",
        '{"seed": self.spec.seed, **overrides}',
        '{"seed": 0, **overrides}',
        f"{RECOMPUTED}::test_training_saw_training_prompts_and_no_episode_twice",
    ),
    Mutation(
        "a checkpoint forgets the time",
        "benchmarks/run/one_run.py",
        '{"agent": counters, "wall_s": self.wall_s, "records": records}',
        '{"agent": counters, "wall_s": 0.0, "records": records}',
        RECOMPUTED,
    ),
    Mutation(
        "the time of the test is free",
        "benchmarks/run/one_run.py",
        'self.wall_s + measured.get("inference_s", 0.0)',
        "self.wall_s",
        RECOMPUTED,
    ),
    Mutation(
        "exact win-rates are SFT's",
        "benchmarks/measure/exact.py",
        "exact.win_rate(log_p, exact.log_ref)",
        "exact.win_rate(exact.log_ref, log_p)",
        EXACT,
    ),
    Mutation(
        "a small budget is more than one batch",
        "benchmarks/run/problems.py",
        "config.group_size * math.ceil(most / config.group_size)",
        "config.episodes",
        "tests/benchmarks/test_cli.py::test_a_round_is_no_larger_than_the_budget",
    ),
    Mutation(
        "exact lengths ignore the probabilities",
        "benchmarks/measure/exact.py",
        "(log_p.exp() * exact.mask.sum(dim=1)).sum(dim=1).mean()",
        "exact.mask.sum(dim=1).double().mean()",
        EXACT,
    ),
    Mutation(
        "held-out loss is that of training data",
        "benchmarks/run/data_problem.py",
        "part = self._held.select(chosen)",
        "part = self._train.select(chosen)",
        LEARN,
    ),
    Mutation(
        "an epoch is a pass over rows, not examples",
        "benchmarks/run/data_problem.py",
        "self.spec.epochs * self._examples(self._train) / settings",
        "self.spec.epochs * len(self._train) / settings",
        LEARN,
    ),
    Mutation(
        "every held-out batch counts the same",
        "benchmarks/run/data_problem.py",
        "units(part, self.agent.unit))",
        "1.0)",
        f"{LEARN}::test_held_out_loss_is_a_mean_over_tokens_whatever_the_batch",
    ),
    Mutation(
        "iterated RLHF measures on what it trained on",
        "algos/iterated_rlhf.py",
        "held = judge_pairs(mdp, self.policy, first + count,",
        "held = judge_pairs(mdp, self.policy, first,",
        ITERATED,
    ),
    Mutation(
        "iterated RLHF's units are taken anew each round",
        "algos/iterated_rlhf.py",
        "        if self.reward is None:\n            self._units",
        "        if True:\n            self._units",
        f"{ITERATED}::test_units_are_those_of_the_first_round",
    ),
    Mutation(
        "a completion's place is its rank",
        "lm_envs/data/packed.py",
        "rank = example.ranks[i] if example.ranks else int(example.label == 0)",
        "rank = i if example.ranks else int(example.label == 0)",
        TOKENIZING,
    ),
    Mutation(
        "validation rows are trained on",
        "lm_envs/data/packed.py",
        "held = split > 0",
        "held = split > 1",
        f"{TOKENIZING}::test_held_out_rows_are_whole_prompts_and_do_not_depend_on_the_order",
    ),
    Mutation(
        "the table's spread divides by n",
        "benchmarks/run/results.py",
        "values.std(ddof=1)",
        "values.std()",
        f"{REPORTED}::test_the_reports_table",
    ),
    Mutation(
        "the table shows the last seed",
        "benchmarks/run/results.py",
        "mean[name] = float(values.mean())",
        "mean[name] = float(values[-1])",
        f"{REPORTED}::test_the_reports_table",
    ),
    Mutation(
        "a percentage's interval is of shares",
        "benchmarks/run/results.py",
        "column.digits - 1, factor, most=factor)",
        "column.digits - 1, most=1)",
        f"{REPORTED}::test_the_reports_table",
    ),
    Mutation(
        "a completion's reference begins where its row does",
        "lm_envs/data/packed.py",
        "4 * int(self._starts[row, 2]))\n                traj",
        "4 * int(self._starts[row, 1]))\n                traj",
        PACKED,
    ),
    Mutation(
        "the reference says something of the chosen rows alone",
        "lm_envs/data/packed.py",
        "whole = PackedExamples(self.folder, mismatched=self._mismatched)",
        "whole = self",
        f"{PACKED} {LEARN}",
    ),
    Mutation(
        "a prompt's rows may be divided",
        "lm_envs/data/packed.py",
        "share(example.key,",
        "share(example.where,",
        TOKENIZING,
    ),
    Mutation(
        "every reward model's text ends in EOS",
        "lm_envs/data/packed.py",
        "append_eos=reward_eos)",
        "append_eos=True)",
        f"{TOKENIZING} {PACKED}",
    ),
    Mutation(
        "the prompt does not count toward the longest",
        "lm_envs/data/packed.py",
        "[prompt + ids for ids in rows] or [prompt]",
        "rows or [prompt]",
        f"{TOKENIZING}::test_prompt_and_completion_together_are_too_long",
    ),
    Mutation(
        "the chosen summary is the worse",
        "lm_envs/data/conventions.py",
        "int(i != choice)",
        "int(i == choice)",
        DATASET,
    ),
    Mutation(
        "a preference's worst completion is imitated",
        "lm_envs/data/conventions.py",
        "example.ranks.index(min(example.ranks))",
        "example.ranks.index(max(example.ranks))",
        DATASET,
    ),
    Mutation(
        "the highest rank is the best",
        "lm_envs/data/conventions.py",
        "enumerate(sorted(set(ranks)))",
        "enumerate(sorted(set(ranks), reverse=True))",
        DATASET,
    ),
    Mutation(
        "a dialogue is cut at its first turn",
        "lm_envs/data/conventions.py",
        ".rfind(ASSISTANT)",
        ".find(ASSISTANT)",
        DATASET,
    ),
    Mutation(
        "a steered coefficient may turn negative",
        "algos/engine/kl_coefficient.py",
        "self.base *= math.exp(min(max(error, -0.2), 0.2) / self.horizon)",
        "self.base *= 1 + error / self.horizon",
        "tests/algos/engine/test_kl_control.py",
    ),
    Mutation(
        "the env casts actions",
        "lm_envs/env/rows.py",
        'if actions.dtype.kind not in "iu":',
        "if False:",
        "tests/lm_envs/env/test_text_env.py",
    ),
    Mutation(
        "temporary names are shared",
        "lm_envs/files.py",
        'f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}"[:255]',
        'f"{TEMPORARY}{path.name}"',
        "tests/lm_envs/test_files.py",
    ),
    Mutation(
        "a damaged library is loaded",
        "kernels/native_library.py",
        'return path.with_suffix(".sha256").read_text().strip() == hashlib.sha256(path.read_bytes()).hexdigest()',
        "return True",
        "tests/kernels/test_native_library.py",
    ),
    Mutation(
        "chunk gradients of a bfloat16 head add up in bfloat16",
        "kernels/linear_logprob_kl.py",
        "exact = torch.promote_types(weight.dtype, torch.float32)",
        "exact = weight.dtype",
        "tests/kernels/test_linear.py::test_chunks_of_a_bfloat16_head_add_up_in_float32",
    ),
    Mutation(
        "tiles of logits are not rounded forward",
        "kernels/logprob_kl_triton_linear.py",
        "total = _rounded(total, hidden.dtype.element_ty, ACC)",
        "total = total",
        "tests/kernels/test_linear.py",
    ),
    Mutation(
        "the KL is finite where the reference excludes a token, in chunks",
        "kernels/logprob_kl_chunked.py",
        "torch.sub(d, e.masked_fill(w == 0, 0.0), out=difference)",
        "torch.sub(d, e.masked_fill(e == -math.inf, 0.0), out=difference)",
        "tests/kernels/test_implementations.py",
    ),
    Mutation(
        "a soft cap of the head is forgotten",
        "lm_envs/model/output_head.py",
        "return (scale, most, None) if fits",
        "return (scale, None, None) if fits",
        "tests/lm_envs/model/test_output_head.py",
    ),
    Mutation(
        "adapters on the head are forgotten",
        "lm_envs/model/output_head.py",
        "names = [] if module.disable_adapters or module.merged else module.active_adapters",
        "names = []",
        "tests/lm_envs/model/test_output_head.py",
    ),
    Mutation(
        "losses cast float64 down",
        "lm_envs/training.py",
        "return x.to(torch.promote_types(x.dtype, torch.float32))",
        "return x.float()",
        "tests/lm_envs/test_training.py",
    ),
    Mutation(
        "a judge's range is a grade",
        "lm_envs/reward/judge.py",
        "clear = not any(_GOES_ON.match(bare, number.end()) for number in numbers)",
        "clear = True",
        "tests/lm_envs/reward/test_judge.py",
    ),
    Mutation(
        "half a key is shown",
        "lm_envs/reward/chat_endpoint.py",
        "size = len(key) if len(key) < 12 else 6",
        "size = len(key)",
        MISBEHAVING,
    ),
    Mutation(
        "a key that was encoded twice is shown",
        "lm_envs/reward/chat_endpoint.py",
        'r"%(?:25)*([0-9a-f]{2})|',
        'r"%([0-9a-f]{2})|',
        MISBEHAVING,
    ),
    Mutation(
        "the judge may take forty times its time",
        "lm_envs/reward/chat_endpoint.py",
        "async with asyncio.timeout(self.timeout):",
        "async with asyncio.timeout(40 * self.timeout):",
        MISBEHAVING,
    ),
    Mutation(
        "answers are kept without the judge's model",
        "lm_envs/reward/chat_endpoint.py",
        "json.dumps([self.url, self.model, list(messages), dict(parameters)]",
        "json.dumps([self.url, list(messages), dict(parameters)]",
        JUDGE,
    ),
    Mutation(
        "grades are read from the judge's thoughts",
        "lm_envs/reward/judge.py",
        "answer = without_thoughts(text).strip()",
        "answer = text.strip()",
        JUDGE,
    ),
    Mutation(
        "a grade of another scale is read",
        "lm_envs/reward/judge.py",
        "m[1] if float(m[2]) == high else m[0]",
        "m[1]",
        JUDGE,
    ),
    Mutation(
        "ROUGE knows ASCII words only",
        "lm_envs/reward/metrics.py",
        'tokenizer=published if words == "published" else _UnicodeWords(published)',
        "tokenizer=published",
        "tests/lm_envs/reward/test_metrics.py",
    ),
    Mutation(
        "a learned reward forgets its units",
        "lm_envs/reward/learned.py",
        "return ((self.raw(rows) - mean) / std).tolist()",
        "return self.raw(rows).tolist()",
        "tests/lm_envs/reward/test_learned.py tests/lm_envs/reward/test_units.py",
    ),
    Mutation(
        "a column replaces a reward's setting",
        "lm_envs/reward/base.py",
        "names |= set(reward.keywords)",
        "names |= set()",
        REWARDS,
    ),
    Mutation(
        "a reward that exits ends the program",
        "lm_envs/reward/base.py",
        "    except (Exception, SystemExit) as error:\n        ours",
        "    except Exception as error:\n        ours",
        REWARDS,
    ),
    Mutation(
        "texts and dates count as rewards",
        "lm_envs/reward/base.py",
        'if values.dtype.kind not in "biufO":',
        "if False:",
        REWARDS,
    ),
    Mutation(
        "text of the policy steers the terminal",
        "lm_envs/env/rows.py",
        "_colored(printable(piece), kl[i])",
        "_colored(piece, kl[i])",
        TEXT_ENV,
    ),
    Mutation(
        "a full cache is a bug",
        "lm_envs/files.py",
        "only=lambda error: error not in own",
        "only=lambda error: False",
        "tests/lm_envs/test_files.py",
    ),
    # What runs take
    Mutation(
        "a plan forgets one of Adam's moments",
        "benchmarks/run/memory.py",
        "return 2 * max(4, self.policy.itemsize)",
        "return 1 * max(4, self.policy.itemsize)",
        "tests/benchmarks/run/test_memory.py",
    ),
    Mutation(
        "a plan takes the smallest phase for the peak",
        "benchmarks/run/memory.py",
        "return max(self.phases, key=",
        "return min(self.phases, key=",
        "tests/benchmarks/run/test_memory.py",
    ),
    Mutation(
        "a plan counts frozen weights twice",
        "benchmarks/run/planning.py",
        "own = [p for p in policy.parameters() if id(p) not in elsewhere]",
        "own = list(policy.parameters())",
        "tests/benchmarks/run/test_planning.py::test_frozen_weights_and_adapters_are_the_references",
    ),
    Mutation(
        "a run that does not fit begins without a word",
        "benchmarks/run/compare.py",
        "if plans and ray is None:",
        "if False:",
        "tests/benchmarks/run/test_planning.py::test_a_run_that_may_not_fit_is_warned_of",
    ),
    Mutation(
        "a plan's timing trains",
        "benchmarks/run/timing.py",
        "agent.optimizer = _Still(trained, lr=config.learning_rate)",
        "agent.optimizer = agent.optimizer",
        "tests/benchmarks/run/test_planning.py::test_timing_changes_no_weight_and_holds_no_moments",
    ),
    # What is on disk
    Mutation(
        "a checkpoint's hashes are not compared",
        "benchmarks/run/storage.py",
        "if all(damaged(path, origin) is not None for origin in origins):",
        "if False:",
        STORAGE,
    ),
    Mutation(
        "a checkpoint of another run is taken",
        "benchmarks/run/storage.py",
        "for run in self.runs] or [None]",
        "for run in ()] or [None]",
        STORAGE,
    ),
    Mutation(
        "records that were changed are continued",
        "benchmarks/run/storage.py",
        "if r.path.name in known and not r.begins(*known[r.path.name])",
        "if r.path.name not in known",
        STORAGE,
    ),
    Mutation(
        "records are known by their size alone",
        "benchmarks/run/storage.py",
        "hashlib.sha256(file.read(size)).hexdigest() == sha",
        "len(file.read(size)) == size",
        STORAGE,
    ),
    Mutation(
        "resumed metrics are doubled",
        "benchmarks/run/one_run.py",
        'each.cut(0 if found is None else found.state["records"][each.path.name][0])',
        "pass",
        ONE_RUN + "::test_a_damaged_checkpoint_costs_time_and_nothing_else",
    ),
    Mutation(
        "a seal is not compared",
        "benchmarks/run/storage.py",
        "if not content or found.get(SEAL) != _hash_of(content):",
        "if not content:",
        STORAGE,
    ),
    Mutation(
        "a plugged-in file that changed is not read again",
        "lm_envs/plugins.py",
        "hashlib.sha256(str(path).encode() + path.read_bytes())",
        "hashlib.sha256(str(path).encode())",
        "tests/lm_envs/test_plugins.py::test_a_file_that_changed_is_read_again",
    ),
    Mutation(
        "a plugged-in algorithm is no input of a run",
        "benchmarks/run/inputs.py",
        'elif name in ("task", "algorithm"):',
        'elif name in ("task",):',
        "tests/benchmarks/run/test_plugged.py::test_train_records_the_hash_and_refuses_to_continue_a_changed_file",
    ),
    Mutation(
        "check: the resumed agent is the one that went before",
        "benchmarks/run/contracts.py",
        "                agent, env = self.agent(), self.env()\n                agent.restore",
        "                agent.restore",
        CONTRACTS,
    ),
    Mutation(
        "check: a batch and its parts may differ",
        "benchmarks/run/contracts.py",
        "if not worst < 1e-9:",
        "if worst == math.inf:",
        CONTRACTS,
    ),
    Mutation(
        "check: nothing is hidden in masked places",
        "benchmarks/run/contracts.py",
        "torch.where(dirty.mask, value, math.nan)",
        "torch.where(dirty.mask, value, 0.0)",
        CONTRACTS,
    ),
    Mutation(
        "changed inputs are not noticed",
        "benchmarks/run/one_run.py",
        "if changed := [name for name, before in config",
        "if changed := [] and [name for name, before in config",
        INPUTS,
    ),
    Mutation(
        "the fingerprint of a model is that of its config",
        "benchmarks/run/inputs.py",
        "if path.suffix in _OF_MODELS and path.is_file():",
        'if path.name == "config.json":',
        INPUTS,
    ),
    Mutation(
        "adapters are known without their base",
        "benchmarks/run/inputs.py",
        "if is_adapter(folder):",
        "if False:",
        INPUTS,
    ),
    Mutation(
        "a hash of a file is remembered by its path alone",
        "benchmarks/run/inputs.py",
        "return _hash_once(path, about.st_size, about.st_mtime_ns, about.st_ino)",
        "return _hash_once(path)",
        INPUTS,
    ),
    Mutation(
        "an answer is stored as it was shown",
        "lm_envs/feedback/server.py",
        "_reordered(read_answer(body, store.settings, count), _inverse(task.order))",
        "read_answer(body, store.settings, count)",
        "tests/lm_envs/feedback/test_server.py::test_an_answer_comes_back_in_the_order_of_the_item_whatever_was_shown",
    ),
    Mutation(
        "an answer replaces one it has not seen",
        "lm_envs/feedback/store.py",
        "            if task.version != version:",
        "            if task.version > version + 1:",
        "tests/lm_envs/feedback/test_server.py::test_two_windows_do_not_collide_and_a_repeated_request_is_no_second_answer",
    ),
    Mutation(
        "any key opens a study",
        "lm_envs/feedback/store.py",
        'if not hmac.compare_digest(self.key(int(number)).encode(), key.encode("utf-8", "replace")):',
        "if not key:",
        "tests/lm_envs/feedback/test_server.py::test_annotators_cannot_reach_each_others_items_or_guess_links",
    ),
    Mutation(
        "answers of another origin are taken",
        "lm_envs/feedback/server.py",
        'if origin is not None and origin.partition("://")[2] not in (request.headers.get("host"), public):',
        'if origin == "":',
        "tests/lm_envs/feedback/test_server.py::test_other_origins_hosts_and_forms_are_refused",
    ),
    Mutation(
        "the link of a person who was deleted becomes the next one's",
        "lm_envs/feedback/database.py",
        "PRIMARY KEY AUTOINCREMENT, name",
        "PRIMARY KEY, name",
        "tests/lm_envs/feedback/test_server.py::test_the_link_of_a_person_who_was_deleted_is_never_another_s",
    ),
    Mutation(
        "the log of answers is readable by everybody",
        "lm_envs/feedback/database.py",
        "path.touch(mode=0o600)\n        path.chmod(0o600)",
        "path.touch()",
        "tests/lm_envs/feedback/test_server.py::test_all_files_of_a_study_are_their_owner_s_alone",
    ),
    Mutation(
        "people's prompts are drawn apart from the judge's",
        "benchmarks/report/human.py",
        "judge[:, chosen].mean(axis=1)",
        "judge[:, chosen[::2]].mean(axis=1)",
        "tests/benchmarks/report/test_human.py::test_the_interval_keeps_together_what_people_and_the_judge_said_of_a_prompt",
    ),
    Mutation(
        "a text is shown as HTML",
        "lm_envs/feedback/server.py",
        '{"html": False, "breaks": True}',
        '{"html": True, "breaks": True}',
        "tests/lm_envs/feedback/test_server.py::test_texts_of_others_are_escaped",
    ),
    Mutation(
        "everybody gets every item",
        "lm_envs/feedback/store.py",
        "WHERE gold OR taken < ?3 ORDER",
        "WHERE gold OR taken < ?3 + 9 ORDER",
        "tests/lm_envs/feedback/test_server.py::test_overlap_gold_and_no_item_twice",
    ),
    Mutation(
        "a tie is a win of the first",
        "lm_envs/feedback/ratings.py",
        "result = (1 + np.sign(ranks[j] - ranks[i])) / 2",
        "result = float(ranks[i] <= ranks[j])",
        "tests/lm_envs/feedback/test_measures.py::test_a_tie_is_half_a_win_and_one_source_fights_no_battle",
    ),
    Mutation(
        "a method is always the same category",
        "lm_envs/feedback/agreement.py",
        "one, other = (i, j) if (judgment.item + i + j) % 2 == 0 else (j, i)",
        "one, other = (i, j)",
        "tests/lm_envs/feedback/test_measures.py::test_people_who_agree_that_one_method_is_better_agree_more_than_chance",
    ),
    Mutation(
        "kappa forgets chance",
        "lm_envs/feedback/agreement.py",
        "return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1",
        "return float((a == b).mean()) if chance < 1",
        "tests/lm_envs/feedback/test_measures.py::test_cohens_kappa_by_hand",
    ),
    Mutation(
        "weights of preferences are forgotten",
        "lm_envs/training.py",
        "weights = (1.0 if weight is None else weight[group].to(losses.dtype))",
        "weights = (1.0 if True else weight[group].to(losses.dtype))",
        "tests/algos/test_packed_data.py",
    ),
    Mutation(
        "people's errors count answers, not prompts",
        "benchmarks/report/human.py",
        'row["human"] = [float(np.mean(values)) if values else np.nan for values in said]',
        'row["human"] = [value for values in said for value in values]',
        "tests/benchmarks/report/test_human.py::test_people_s_win_rates_are_their_answers",
    ),
    Mutation(
        "a reward model is measured on what it learned",
        "benchmarks/commands/people_loop.py",
        """(Example(j.content.prompt).key, "train") != "train"]""",
        """(Example(j.content.prompt).key, "train") != ""]""",
        "tests/benchmarks/commands/test_people.py::test_rounds_wait_for_people_and_go_on",
    ),
    Mutation(
        "a round begins before people have answered",
        "benchmarks/commands/people_loop.py",
        "if lacking > 0 and not answers.exists()",
        "if lacking > 99 and not answers.exists()",
        "tests/benchmarks/commands/test_people.py::test_rounds_wait_for_people_and_go_on",
    ),
    Mutation(
        "margins against people have the wrong sign",
        "lm_envs/feedback/agreement.py",
        "margin = (row[i] - row[j]) * np.sign(ranks[j] - ranks[i])",
        "margin = (row[i] - row[j]) * np.sign(ranks[i] - ranks[j])",
        "tests/lm_envs/feedback/test_measures.py::test_a_reward_model_s_margins_against_people",
    ),
    Mutation(
        "a damaged result counts as finished",
        "benchmarks/run/storage.py",
        "if (name := damaged(folder, names=names)) is not None:",
        'if (name := damaged(folder, names=["config.json"])) is not None:',
        ONE_RUN + "::test_a_finished_run_that_was_damaged_is_made_again",
    ),
    Mutation(
        "SFT's greedy texts and the policy's change places",
        "benchmarks/measure/samples.py",
        "texts = list(zip(prompts, theirs, ours, strict=True))",
        "texts = list(zip(prompts, ours, theirs, strict=True))",
        f"{SAMPLES}::test_greedy_texts_are_those_of_sft_and_of_the_policy",
    ),
    Mutation(
        "error bars of people and of the judge change places",
        "benchmarks/report/plots.py",
        'errors = (200 * line.spread["human"], 200 * line.spread["win_rate"])',
        'errors = (200 * line.spread["win_rate"], 200 * line.spread["human"])',
        "tests/benchmarks/report/test_human.py::test_the_bars_of_people_are_upright_and_those_of_the_judge_lie",
    ),
    Mutation(
        "a learning curve lacks its last point",
        "benchmarks/run/one_run.py",
        "if every and (done % every == 0 or self._over or self.ended):",
        "if every and done % every == 0:",
        f"{ONE_RUN}::test_a_run_of_few_iterations_has_a_learning_curve_too",
    ),
    Mutation(
        "the held-out loss is weighted",
        "benchmarks/run/data_problem.py",
        "            part.weight = None\n",
        "",
        f"{LEARN}::test_held_out_loss_is_of_rows_alike_whatever_their_weights",
    ),
    Mutation(
        "a line of throughput that is measured again stays beside the new one",
        "benchmarks/speed/throughput.py",
        "known = old.pop(_key(line), None)",
        "known = old.get(_key(line), None)",
        "tests/benchmarks/speed/test_throughput.py::test_what_is_measured_again_takes_the_place_of_its_line",
    ),
    Mutation(
        "messages lose what is neither role nor content",
        "lm_envs/data/conventions.py",
        "found.append({part: said for part, said in message.items() if said is not None})",
        'found.append({part: message[part] for part in ("role", "content")})',
        DATASET,
    ),
    Mutation(
        "rows get the weights of other rows",
        "lm_envs/data/packed.py",
        'self.column("weight").view(np.float64)[chosen]',
        'self.column("weight").view(np.float64)[: len(chosen)]',
        f"{PACKED}::test_a_row_s_loss_is_multiplied_by_its_weight",
    ),
    Mutation(
        "excluded tokens come back under a softcap, chunked",
        "kernels/logprob_kl_chunked.py",
        ".mul_(options.softcap).masked_fill_(never, -math.inf)",
        ".mul_(options.softcap)",
        "tests/kernels/test_implementations.py::test_excluded_tokens_stay_excluded_under_a_softcap",
    ),
    Mutation(
        "greedy responses may end before their least length",
        "lm_envs/model/decoding.py",
        '{"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}',
        '{"max_new_tokens": max_new_tokens, "min_new_tokens": 0}',
        "tests/lm_envs/model/test_decoding.py::test_greedy_takes_the_likeliest_token_that_is_allowed",
    ),
    Mutation(
        "perplexity per word leaves out the ends",
        "lm_envs/tasks/corpus.py",
        "len(text.split()) + 1 for text",
        "len(text.split()) for text",
        "tests/lm_envs/tasks/test_corpus.py::test_perplexity_per_word_counts_words_and_ends",
    ),
    Mutation(
        "a reference without room for its end is trained on",
        "lm_envs/tasks/translation.py",
        "if len(target) < config.max_new_tokens]",
        "if len(target) <= config.max_new_tokens]",
        "tests/lm_envs/tasks/test_translation.py::test_references_without_room_for_their_end_are_left_out_of_training",
    ),
    Mutation(
        "skipped items count in an annotator's median time",
        "lm_envs/feedback/summary.py",
        "agreement.seconds([judgment for judgment in own if not judgment.answer.skipped])",
        "agreement.seconds(own)",
        "tests/lm_envs/feedback/test_measures.py::test_an_annotator_s_time_is_the_median_of_answers_without_skipped_items",
    ),
    # What sft, reward-model and dpo leave, and names that others would take for patterns or markup
    Mutation(
        "a preference's weight is read and not used",
        "algos/reward_modelling.py",
        "loss = fit(scores, ranks, group_weights(traj))",
        "loss = fit(scores, ranks)",
        "tests/benchmarks/test_recomputed_learning.py tests/algos/test_packed_data.py",
    ),
    Mutation(
        "a saved model is measured as the start",
        "benchmarks/run/problems.py",
        "self.policy = LMPolicy.for_mdp(mdp, load_beside(place, self.task.reference, self.task.tokenizer))",
        "load_beside(place, self.task.reference, self.task.tokenizer)",
        "tests/benchmarks/run/test_saved.py::test_a_saved_model_has_the_results_of_the_run_that_left_it",
    ),
    Mutation(
        "a saved model is no input",
        "benchmarks/run/inputs.py",
        'name == "algorithm" and (place := saved(text)) is not None',
        'name == "policy" and (place := saved(text)) is not None',
        "tests/benchmarks/run/test_saved.py::test_its_weights_are_an_input",
    ),
    Mutation(
        "a saved model may have another tokenizer",
        "lm_envs/model/loading.py",
        "if own.get_vocab() != tokenizer.get_vocab():",
        "if not own.get_vocab():",
        "tests/benchmarks/run/test_saved.py::test_another_tokenizer_is_refused",
    ),
    Mutation(
        "adapters' wide products are kept for backward",
        "lm_envs/model/layers.py",
        "keep = into <= out <= _WIDEST * into",
        "keep = into <= out",
        "tests/algos/engine/test_spared.py::test_adapters_add_nothing_to_what_recomputation_keeps",
    ),
    Mutation(
        "a reward model's calibration is of one chunk's numbers",
        "benchmarks/run/data_problem.py",
        "numbers = chosen[groups.cpu()].tolist()",
        "numbers = groups.tolist()",
        f"{LEARN}::test_a_reward_model_s_accuracy_has_an_interval_and_a_calibration",
    ),
    Mutation(
        "a margin is the worse text's lead",
        "algos/reward_modelling.py",
        "(scores[:, :, None] - scores[:, None, :])[pairs]",
        "(scores[:, None, :] - scores[:, :, None])[pairs]",
        f"{LEARN}::test_a_reward_model_s_accuracy_has_an_interval_and_a_calibration",
    ),
    Mutation(
        "an algorithm's name is markup in the table",
        "benchmarks/run/results.py",
        "made.add_row(escape(line.task), escape(line.title),",
        "made.add_row(escape(line.task), line.title,",
        "tests/benchmarks/test_brackets.py::test_a_comparison_of_what_is_plugged_in",
    ),
    Mutation(
        "dollars in names are formulas in the plots",
        "benchmarks/report/plots.py",
        '"text.parse_math": False,',
        '"text.parse_math": True,',
        "tests/benchmarks/test_brackets.py::test_a_comparison_of_what_is_plugged_in",
    ),
    Mutation(
        "a folder of data is a pattern",
        "lm_envs/data/sources.py",
        'if not os.path.isdir(path) or ("::" not in path and not set("*?[") & set(path)):',
        'if not os.path.isdir(path) or "::" not in path:',
        "tests/benchmarks/test_brackets.py::test_data_of_any_name_are_checked",
    ),
    Mutation(
        "a reward model starts from the base of its adapters",
        "lm_envs/reward/learned.py",
        "        model.base_model.load_state_dict(trunk.state_dict())\n",
        "",
        f"{LEARN}::test_a_reward_model_starts_from_adapters_as_the_other_stages_do",
    ),
    Mutation(
        "a task's folder is not looked into",
        "benchmarks/run/inputs.py",
        'or (name == "path" and os.path.isdir(text)) else _file',
        "else _file",
        f"{INPUTS}::test_the_folder_of_a_built_task_has_a_hash_of_its_contents",
    ),
    Mutation(
        "a controller takes NaN",
        "algos/engine/kl_coefficient.py",
        "if not (value > 0 and math.isfinite(value)):",
        "if value <= 0:",
        "tests/algos/engine/test_kl_control.py",
    ),
    Mutation(
        "weights in whole numbers are taken",
        "lm_envs/model/loading.py",
        '    _refuse_whole_numbers(Path(place), model, f"{what} {place!r}")\n',
        "",
        "tests/benchmarks/test_bad_input.py::test_models_that_are_broken_are_refused_before_training",
    ),
    # Survivors of two blind rounds
    Mutation(
        "start's error is the model's",
        "benchmarks/measure/samples.py",
        '"start_gold_se": standard_error(start.gold),',
        '"start_gold_se": standard_error(found.gold),',
        "tests/benchmarks/measure/test_samples.py::test_the_start_has_a_standard_error_of_its_own",
    ),
    Mutation(
        "the suite's options win over the command's",
        "benchmarks/commands/options.py",
        "{**task.options, **own.get(base_task(task.name)[0], {})}",
        "{**own.get(base_task(task.name)[0], {}), **task.options}",
        "tests/benchmarks/test_cli.py::test_sources_on_the_command_line_come_before_those_of_a_suite",
    ),
    Mutation(
        "control's test episodes are those of validation",
        "benchmarks/run/problems.py",
        "self._returns(100, (1 << 21) + self.spec.seed)",
        "self._returns(100, (1 << 20) + self.spec.seed)",
        "tests/algos/test_control.py::test_the_result_is_of_other_episodes_than_the_curve_and_of_others_for_each_seed",
    ),
    Mutation(
        "the note names the most prompts",
        "benchmarks/run/results.py",
        "fewest = min((line.prompts for line in sampled",
        "fewest = max((line.prompts for line in sampled",
        "tests/benchmarks/run/test_results.py::test_few_prompts_and_few_seeds_are_said",
    ),
    Mutation(
        "before is after",
        "benchmarks/commands/learn.py",
        'before = next(iter(Records(out / "metrics.jsonl").read()), {})',
        'before = ([{}] + Records(out / "metrics.jsonl").read())[-1]',
        "tests/benchmarks/commands/test_learn.py::test_the_figures_printed_are_those_before_and_after",
    ),
    Mutation(
        "the peak is the proxy's",
        "benchmarks/commands/overoptimize.py",
        "key=c.gold.__getitem__",
        "key=c.proxy.__getitem__",
        "tests/benchmarks/report/test_overoptimization.py::test_the_command_tells_where_gold_was_highest",
    ),
    Mutation(
        "the last label of a repeated text",
        "lm_envs/tasks/corpus.py",
        "labels.setdefault(text, example.label)",
        "labels[text] = example.label",
        "tests/lm_envs/tasks/test_corpus.py::test_a_repeated_text_has_its_first_label",
    ),
    Mutation(
        "an answer is shown in the inverse order",
        "lm_envs/feedback/server.py",
        "asdict(_reordered(task.answer, task.order))",
        "asdict(_reordered(task.answer, _inverse(task.order)))",
        "tests/lm_envs/feedback/test_server.py::test_an_answer_is_shown_again_in_the_order_in_which_it_was_given",
    ),
    Mutation(
        "a typed a is b",
        "benchmarks/commands/people_terminal.py",
        '{"a": [0, 1], "b": [1, 0], "t"',
        '{"a": [1, 0], "b": [0, 1], "t"',
        "tests/benchmarks/commands/test_people.py::test_a_letter_typed_prefers_the_response_that_is_shown_by_it",
    ),
    Mutation(
        "one method that samples nothing changes the axis",
        "benchmarks/report/plots.py",
        "if known and not all(ends):",
        "if known and not any(ends):",
        "tests/benchmarks/run/test_results.py::test_learning_curves_of_a_method_that_samples_nothing_count_trained_tokens",
    ),
    Mutation(
        "long bodies in parts",
        "lm_envs/feedback/server.py",
        'length += len(message.get("body", b""))',
        'length = len(message.get("body", b""))',
        "tests/lm_envs/feedback/test_server.py::test_a_body_in_parts_is_as_long_as_they_are_together",
    ),
    Mutation(
        "gold items are never left",
        "lm_envs/feedback/store.py",
        "\"IS NOT NULL) AND (known != '[]' OR (SELECT",
        '"IS NOT NULL) AND ((SELECT',
        "tests/lm_envs/feedback/test_server.py::test_gold_items_are_left_to_everybody_and_others_until_enough_have_answered",
    ),
    Mutation(
        "simpo sums",
        "algos/engine/preference_losses.py",
        "if free or config.length_normalized:",
        "if config.length_normalized:",
        "tests/algos/engine/test_preference_losses.py::test_simpo_compares_means_over_each_responses_tokens",
    ),
    Mutation(
        "iterated: the same annotators each round",
        "algos/iterated_rlhf.py",
        "flip=config.flip, seed=config.seed + number)",
        "flip=config.flip, seed=config.seed)",
        "tests/algos/test_iterated_rlhf.py::test_each_round_has_annotators_of_its_own",
    ),
    Mutation(
        "judged pairs share random numbers",
        "algos/engine/judged_pairs.py",
        "row = sampling.SAMPLE_EPISODES + 2 * first + np.arange(2 * count)",
        "row = sampling.SAMPLE_EPISODES + first + np.arange(2 * count)",
        "tests/algos/test_iterated_rlhf.py::test_pairs_of_other_numbers_are_sampled_with_other_random_numbers",
    ),
    Mutation(
        "over-optimisation forgets the task's options",
        "benchmarks/commands/overoptimize.py",
        "options = self.own.options().get(base_task(self.task)[0], {})",
        "options = self.own.options().get(self.algorithm, {})",
        "tests/benchmarks/report/test_overoptimization.py::test_the_command_gives_the_tasks_source_on",
    ),
    # Numbers that were computed in one place and asserted in shape
    Mutation(
        "Krippendorff's alpha of ratings is nominal",
        "lm_envs/feedback/agreement.py",
        "level_of_measurement=level",
        'level_of_measurement="nominal"',
        f"{FEEDBACK}::test_agreement",
    ),
    Mutation(
        "the bias's interval is over means of items",
        "lm_envs/feedback/agreement.py",
        "= sums[draws].sum(1) / counts[draws].sum(1)",
        "= (sums / counts)[draws].mean(1)",
        f"{FEEDBACK}::test_biases",
    ),
    Mutation(
        "the interval of the agreement is one of 90 %",
        "lm_envs/feedback/agreement.py",
        "np.nanquantile(found, (0.025, 0.975)) if",
        "np.nanquantile(found, (0.05, 0.95)) if",
        f"{FEEDBACK}::test_agreement",
    ),
    Mutation(
        "an item that is drawn twice is one",
        "lm_envs/feedback/agreement.py",
        "return Judgment(judgment.annotator, item, judgment.content",
        "return Judgment(judgment.annotator, judgment.item, judgment.content",
        f"{FEEDBACK}::test_agreement",
    ),
    Mutation(
        "the first response is always the longer one",
        "lm_envs/feedback/agreement.py",
        "len(judgment.content.responses[j].text),\n    )",
        "0,\n    )",
        f"{FEEDBACK}::test_biases",
    ),
    Mutation(
        "all simulated annotators choose alike",
        "lm_envs/feedback/annotators.py",
        "self.seed, rng.ANNOTATOR",
        "0, rng.ANNOTATOR",
        f"{FEEDBACK}::test_an_annotator_s_answers",
    ),
    Mutation(
        "an answer is flipped by the first choice's number",
        "lm_envs/feedback/annotators.py",
        "if draws[0] < self.flip:",
        "if draws[1] < self.flip:",
        f"{FEEDBACK}::test_an_annotator_s_answers",
    ),
    Mutation(
        "simulated people rate on a scale of 7",
        "lm_envs/feedback/annotators.py",
        "store.settings.scale if store.settings.mode",
        "7 if store.settings.mode",
        f"{FEEDBACK}::test_simulated_people_do_as_much_as_they_are_told",
    ),
    Mutation(
        "the interval of Bradley-Terry is one of 90 %",
        "lm_envs/feedback/ratings.py",
        "low, high = np.quantile(resampled, (0.025, 0.975), axis=0)\n    counts = (wins",
        "low, high = np.quantile(resampled, (0.05, 0.95), axis=0)\n    counts = (wins",
        f"{FEEDBACK}::test_ratings_of_the_methods",
    ),
    Mutation(
        "items that others hold come first",
        "lm_envs/feedback/store.py",
        "ORDER BY NOT gold, taken * NOT gold, id",
        "ORDER BY NOT gold, id",
        f"{STUDIES}::test_the_next_item_is_the_one_that_fewest_answered_or_hold",
    ),
    Mutation(
        "everybody sees the same order",
        "lm_envs/feedback/store.py",
        "annotator * 1000 + np.arange(count)",
        "np.arange(count)",
        f"{STUDIES}::test_the_order_shown_is_that_of_counted_numbers",
    ),
    Mutation(
        "what was taken back waits",
        "lm_envs/feedback/store.py",
        "ORDER BY version = 0, at LIMIT 1",
        "ORDER BY at LIMIT 1",
        f"{STUDIES}::test_what_was_taken_back_is_asked_for_before_what_was_never_answered",
    ),
    Mutation(
        "a row's agreement leaves its own annotator out",
        "lm_envs/feedback/exchange.py",
        "votes.count(own) / len(votes) for own, votes in compared",
        "(votes.count(own) - 1) / max(len(votes) - 1, 1) for own, votes in compared",
        f"{STUDIES}::test_rows_say_everything_once",
    ),
    Mutation(
        "Label Studio: what was not ranked is the best",
        "lm_envs/feedback/exchange.py",
        "order.index(name) if name in order else len(order)",
        "order.index(name) if name in order else 0",
        f"{STUDIES}::test_what_label_studio_says",
    ),
    Mutation(
        "ratings are stored as they were shown",
        "lm_envs/feedback/server.py",
        'for name in ("ranks", "ratings", "flags", "reasons"):',
        'for name in ("ranks", "flags", "reasons"):',
        f"{STUDIES}::test_the_page_gives_and_takes_each_list_in_the_order_shown",
    ),
    Mutation(
        "a study of a comparison takes all prompts",
        "benchmarks/commands/people_items.py",
        "zip(*samples.values(), strict=False), limit)",
        "zip(*samples.values(), strict=False), None)",
        f"{PEOPLE}::test_no_more_is_read_than_is_asked_for",
    ),
    Mutation(
        "one method without a judge hides the gold of all",
        "benchmarks/run/aggregate.py",
        'return "proxy" if all(',
        'return "proxy" if any(',
        f"{AGGREGATE}::test_methods_are_compared_by_gold_where_any_of_them_has_one",
    ),
    Mutation(
        "differences pair runs by place, not by seed",
        "benchmarks/run/aggregate.py",
        "next(row for row in rows if run_key(row) == key) for key in keys",
        "rows[k % len(rows)] for k, key in enumerate(keys)",
        f"{AGGREGATE}::test_every_line",
    ),
    Mutation(
        "a score is the regret",
        "benchmarks/run/aggregate.py",
        "return 1 - regret",
        "return regret",
        f"{AGGREGATE}::test_every_line",
    ),
    Mutation(
        "lengths have another zero",
        "benchmarks/run/aggregate.py",
        "gap = np.array(gaps, dtype=float)",
        "gap = np.array(gaps, dtype=float) + 3",
        f"{AGGREGATE}::test_every_line",
    ),
    Mutation(
        "p-values of the CSV are of one pair at a time",
        "benchmarks/run/aggregate.py",
        "pair.estimate, ours, p=pair.p)",
        "pair.estimate, ours, p=pair.estimate.p)",
        f"{AGGREGATE}::test_every_line",
    ),
    Mutation(
        "a worse method is clearly better",
        "benchmarks/run/aggregate.py",
        "self.p < ALARM and self.estimate.value > 0 and",
        "self.p < ALARM and",
        f"{AGGREGATE}::test_what_is_clearly_better_is_said_with_the_differences_of_the_csv",
    ),
    Mutation(
        "the furthest KL is the last one",
        "benchmarks/run/matched.py",
        'furthest = max((point["validation_kl"] for curve in curves for point in curve)',
        'furthest = max((curve[-1]["validation_kl"] for curve in curves if curve)',
        f"{AGGREGATE}::test_every_line",
    ),
    Mutation(
        "seeds are always fewer than prompts",
        "benchmarks/measure/statistics.py",
        "(a, b) if count <= prompts else (b, a)",
        "(a, b)",
        f"{AGGREGATE}::test_seeds_and_prompts_may_change_places",
    ),
    Mutation(
        "soft best-of-n is measured as the hard one",
        "benchmarks/measure/exact.py",
        "exact.best_of_n(log_p, policy.n, policy.temperature)",
        "exact.best_of_n(log_p, policy.n)",
        f"{EXACT}::test_every_measure_is_computed_a_second_time",
    ),
    Mutation(
        "halfway to the optimum is the sum of both",
        "benchmarks/measure/exact.py",
        "- math.log(2)",
        "",
        f"{EXACT}::test_every_measure_is_computed_a_second_time",
    ),
    Mutation(
        "the optimal frontier ends early",
        "benchmarks/measure/exact.py",
        "np.geomspace(20, 2e-3, _POINTS)",
        "np.geomspace(20, 2e-2, _POINTS)",
        f"{EXACT}::test_every_measure_is_computed_a_second_time",
    ),
    Mutation(
        "exact episodes are all of the first prompt",
        "lm_envs/exact/solver.py",
        '"prompt_index": index}',
        '"prompt_index": 0 * index}',
        "tests/lm_envs/exact/test_solver.py::test_enumerated_episodes_know_their_prompts",
    ),
    Mutation(
        "exact values are those after the token",
        "lm_envs/exact/solver.py",
        ".value[:, :-1] for rows",
        ".value[:, 1:] for rows",
        "tests/lm_envs/exact/test_solver.py::test_a_critic_s_values_are_those_of_their_prefixes",
    ),
    Mutation(
        "the floor of throughput is divided by the time",
        "benchmarks/speed/throughput.py",
        'round(one["seconds"] / floor, 3)',
        'round(floor / one["seconds"], 3)',
        "tests/benchmarks/speed/test_throughput.py::test_every_number_of_a_line_is_computed_a_second_time",
    ),
    Mutation(
        "throughput counts texts",
        "benchmarks/speed/throughput.py",
        'round(size.tokens / one["seconds"], 1)',
        'round(size.rows / one["seconds"], 1)',
        "tests/benchmarks/speed/test_throughput.py::test_every_number_of_a_line_is_computed_a_second_time",
    ),
    Mutation(
        "a kernel's time is its floor's share",
        "benchmarks/speed/kernels.py",
        'round(floor / seconds, 3), "peak',
        'round(seconds / floor, 3), "peak',
        "tests/benchmarks/speed/test_kernels.py::test_every_number_of_a_line_is_computed_a_second_time",
    ),
    Mutation(
        "ratios are of medians",
        "benchmarks/speed/kernels.py",
        "return statistics.median(a / b for a, b in zip(own, base, strict=True))",
        "return statistics.median(own) / statistics.median(base)",
        "tests/benchmarks/speed/test_kernels.py::test_ratios_are_within_rounds_which_go_there_and_back",
    ),
    Mutation(
        "a probe's score starts at 0",
        "benchmarks/probes/base.py",
        "(value - self.start) / (self.optimum - self.start)",
        "value / self.optimum",
        "tests/benchmarks/probes/test_probes.py::test_the_score_by_hand",
    ),
    Mutation(
        "a probe's optimum is for gold, not for the proxy",
        "benchmarks/probes/base.py",
        "exact.optimal_policy if case.taught is None",
        "exact.optimal_policy if case.rewards is not None",
        "tests/benchmarks/probes/test_probes.py::test_the_optimum_is_that_of_brute_force",
    ),
    Mutation(
        "a probe's sampler is refreshed every time",
        "benchmarks/probes/staleness.py",
        "iteration % int(value) == 0",
        "iteration % 1 == 0",
        "tests/benchmarks/probes/test_probes.py::test_the_stale_sampler_is_refreshed_when_it_is_due",
    ),
    Mutation(
        "a probe's runs are not done again where a line was cut",
        "benchmarks/probes/running.py",
        "if (name, value, algorithm, seed) not in found:",
        "if not found:",
        "tests/benchmarks/probes/test_running.py::test_a_run_that_was_killed_is_continued_and_extended",
    ),
    Mutation(
        "a failure that all runs share does not stop the others",
        "benchmarks/run/workers.py",
        'if event.get("fatal"):\n                stop.requested',
        'if event.get("never"):\n                stop.requested',
        "tests/benchmarks/run/test_workers.py::test_after_a_fatal_failure_no_job_begins",
    ),
    Mutation(
        "a worker that was killed gets the next job",
        "benchmarks/run/workers.py",
        "self._idle += [worker] * worker.process.is_alive()",
        "self._idle += [worker]",
        "tests/benchmarks/run/test_workers.py::test_a_process_that_is_killed_fails_its_job_alone",
    ),
    Mutation(
        "a forecast lets sampling shrink without end",
        "benchmarks/speed/forecast.py",
        "max(alone, reading)",
        "alone",
        "tests/benchmarks/speed/test_forecast.py::test_parts_by_hand",
    ),
    Mutation(
        "values at which nothing works are held against each method",
        "benchmarks/probes/report.py",
        "if value not in scores.hopeless[name]]",
        "if name]",
        "tests/benchmarks/probes/test_running.py::test_words_by_hand",
    ),
    Mutation(
        "answers are found where the prompt says the same",
        "lm_envs/model/chat.py",
        ".strip(), len(before))",
        ".strip())",
        "tests/lm_envs/model/test_text.py::test_a_policy_learns_behind_what_it_will_be_given",
    ),
    Mutation(
        "comparisons on two splits are merged",
        "benchmarks/run/merge.py",
        '"validation_prompts", "split")',
        '"validation_prompts")',
        "tests/benchmarks/run/test_merge.py::test_tasks_that_were_measured_otherwise_are_refused",
    ),
    Mutation(
        "two seeds that answer alike are one run",
        "benchmarks/run/merge.py",
        'return self.config["run"]["seed"], str(',
        "return 0, str(",
        "tests/benchmarks/run/test_merge.py::test_one_run_under_two_names_counts_once",
    ),
    Mutation(
        "two settings that answer alike are one run",
        "benchmarks/run/merge.py",
        'str(self.config.get("agent")), sha256',
        '"", sha256',
        "tests/benchmarks/run/test_merge.py::test_one_run_under_two_names_counts_once",
    ),
    Mutation(
        "runs on other threads are merged without a word",
        "benchmarks/run/merge.py",
        ', "threads": self.config.get("threads")}',
        "}",
        "tests/benchmarks/run/test_merge.py::test_other_conditions_are_told",
    ),
    Mutation(
        "the gap is told of a policy that did not read the batch",
        "algos/engine/agent.py",
        "traj.logprob is not None, kept or before.was_read",
        "traj.logprob is not None, True",
        "tests/algos/engine/test_agent.py::test_a_gap_is_told_only_where_the_policy_read_the_batch",
    ),
    Mutation(
        "rounds of throughput never go back",
        "benchmarks/speed/throughput.py",
        "for name in list(ways)[:: -1 if turn % 2 else 1]}",
        "for name in list(ways)}",
        "tests/benchmarks/speed/test_throughput.py::test_every_second_round_goes_back_and_the_first_call_is_its_own",
    ),
    Mutation(
        "the display forgets what was validated",
        "benchmarks/run/progress.py",
        "known |= metrics",
        "known.clear(); known.update(metrics)",
        "tests/benchmarks/run/test_progress.py::test_lines_where_there_is_no_terminal",
    ),
    Mutation(
        "the display shows validation's KL for training's",
        "benchmarks/run/progress.py",
        '("kl", "validation_kl")',
        '("validation_kl", "kl")',
        "tests/benchmarks/run/test_progress.py::test_figures_of_an_iteration",
    ),
    Mutation(
        "control environments are measured on one seed",
        "benchmarks/run/problems.py",
        "(1 << 21) + self.spec.seed)",
        "1 << 21)",
        "tests/benchmarks/run/test_recomputed_control.py::test_the_result_of_a_control_environment",
    ),
    Mutation(
        "inference on a control environment costs a token an episode",
        "benchmarks/run/problems.py",
        '"inference_tokens": int(lengths.sum()),',
        '"inference_tokens": len(lengths),',
        "tests/benchmarks/run/test_recomputed_control.py::test_the_result_of_a_control_environment",
    ),
    Mutation(
        "logged texts have their rewards for scores",
        "benchmarks/run/problems.py",
        "scores = traj.score[rows].tolist()",
        "scores = traj.reward[rows].sum(dim=1).tolist()",
        "tests/benchmarks/run/test_recomputed_control.py::test_the_texts_of_a_batch_have_their_scores_and_frozen_weights_are_not_trained",
    ),
    Mutation(
        "a stop rule ends a run before it began",
        "benchmarks/run/stopping.py",
        "if held and iteration else None",
        "if held else None",
        "tests/benchmarks/run/test_stopping.py::test_rules_by_hand",
    ),
    Mutation(
        "a measurement as good as the best counts as better",
        "benchmarks/run/stopping.py",
        "if value > self._best.get",
        "if value >= self._best.get",
        "tests/benchmarks/run/test_stopping.py::test_rules_by_hand",
    ),
    Mutation(
        "a resumed run forgets what its stop rules saw",
        "benchmarks/run/one_run.py",
        "self._watch(*(self.metrics.read() if self.leads else ()))",
        "self._watch()",
        "tests/benchmarks/run/test_stopping.py::test_a_run_cut_anywhere_stops_at_the_same_iteration",
    ),
    Mutation(
        "the reference reads for nothing",
        "algos/engine/sampling.py",
        "(traj.score is not None) + (traj.ref_logprob is not None) +",
        "(traj.score is not None) +",
        "tests/benchmarks/measure/test_cost.py::test_each_method_is_charged_for_what_it_takes",
    ),
    Mutation(
        "a budget of sampled and scored tokens counts the sampled only",
        "benchmarks/run/budgets.py",
        '"total_tokens": sampled + agent.scored_tokens',
        '"total_tokens": sampled',
        "tests/benchmarks/run/test_budgets.py::test_a_run_ends_with_the_iteration_that_reaches_its_budget",
    ),
    Mutation(
        "a performance profile counts scores at a threshold",
        "benchmarks/measure/statistics.py",
        "(scores > threshold)",
        "(scores >= threshold)",
        "tests/benchmarks/measure/test_statistics.py::test_a_performance_profile_by_hand",
    ),
    Mutation(
        "the report's differences have the same sign on both sides",
        "benchmarks/report/html.py",
        "each.methods: each for pair",
        "each.methods: pair for pair",
        "tests/benchmarks/run/test_results.py::test_every_method_is_compared_with_each_other",
    ),
    Mutation(
        "intervals over a task's models take runs for models",
        "benchmarks/measure/statistics.py",
        'crossed_mean(np.array([group.mean(axis=0) for group in groups]), "models")',
        'crossed_mean(outcomes, "models")',
        "tests/benchmarks/measure/test_statistics.py::test_a_nested_mean_by_hand",
    ),
    Mutation(
        "methods on several versions of a task are paired by seeds alone",
        "benchmarks/run/results.py",
        'return row.get("task_seed", 0), row["seed"]',
        'return 0, row["seed"]',
        "tests/benchmarks/run/test_task_seeds.py::test_methods_are_paired_by_version_and_seed",
    ),
]


def broken(mutation: Mutation, text: str) -> str:
    """The file's text with the mutation in it.

    Raises:
        ValueError: the old text does not stand in it exactly once, so the list is out of date.
    """
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.name!r}: its text stands {found} times in {mutation.file}, and must once")
    return text.replace(mutation.old, mutation.new)


def _tests(folder: Path, selection: str) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import pytest

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *selection.split()])
    os._exit(int(code))


def passes(folder: Path, selection: str) -> bool:
    """Whether the tests pass there; each time in a process of its own that has only the libraries loaded.

    Raises:
        RuntimeError: they could not be run.
    """
    process = multiprocessing.get_context("fork").Process(target=_tests, args=(folder, selection))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        raise RuntimeError(f"pytest ended with {process.exitcode} on {selection}")
    return process.exitcode == 0


def copy_to(folder: Path) -> Path:
    """Copy the checkout's sources into a folder."""
    kept_away = shutil.ignore_patterns(".*", "build", "runs", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(CHECKOUT, folder / f"checkout-{os.getpid()}", ignore=kept_away))


def survives(folder: Path, mutation: Mutation) -> bool:
    """Whether the tests pass with the mutation in the copy, which is mended afterwards."""
    path = folder / mutation.file
    whole = path.read_text(encoding="utf-8")
    path.write_text(broken(mutation, whole), encoding="utf-8")
    try:
        return passes(folder, mutation.tests)
    finally:
        path.write_text(whole, encoding="utf-8")


def _work(folder: Path, jobs: list[Mutation | str], taken: Any, found: Any) -> None:
    """Take jobs until none is left: a selection of tests that should pass, or a mutation that should not survive."""
    checkout = copy_to(folder)
    while True:
        with taken.get_lock():
            number, taken.value = taken.value, taken.value + 1
        if number >= len(jobs):
            return
        job, start = jobs[number], time.perf_counter()
        passed = passes(checkout, job) if isinstance(job, str) else survives(checkout, job)
        found.put((number, passed, time.perf_counter() - start))


def results(jobs: list[Mutation | str], processes: int) -> Iterator[tuple[Mutation | str, bool, float]]:
    """Each job, whether its tests passed, and the seconds they took, as they are done, by this many processes.

    Raises:
        RuntimeError: a process ended early.
    """
    context = multiprocessing.get_context("fork")
    taken, found = context.Value("i", 0), context.Queue()
    with tempfile.TemporaryDirectory() as name:
        workers = [context.Process(target=_work, args=(Path(name), jobs, taken, found)) for _ in range(processes)]
        for worker in workers:
            worker.start()
        for _ in jobs:
            while True:
                try:
                    number, passed, seconds = found.get(timeout=5)
                    break
                except queue.Empty:
                    if any(worker.exitcode for worker in workers):
                        raise RuntimeError("a process that ran tests ended; its message stands above") from None
            yield jobs[number], passed, seconds
        for worker in workers:
            worker.join()


def main(words: list[str], processes: int = 2) -> int:
    """Runs the mutations whose name holds one of the words, all if there are none; 1 if one survives."""
    sys.dont_write_bytecode = True  # a file that is broken and mended within a second would run from a stale one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import gymnasium  # noqa: F401 - loaded once, before the processes part
    import torch

    if not torch.cuda.is_available():  # as the tests do, before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel  # noqa: F401

    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if not chosen:
        print(f"no mutation has {' or '.join(words)} in its name; there are:", *(m.name for m in MUTATIONS), sep="\n  ")
        return 2
    for mutation in chosen:
        broken(mutation, (CHECKOUT / mutation.file).read_text(encoding="utf-8"))  # is the list in date?
    failing, survivors, start = [], [], time.perf_counter()
    for job, passed, seconds in results([*dict.fromkeys(m.tests for m in chosen), *chosen], processes):
        if isinstance(job, str):
            failing += [] if passed else [job]
            continue
        survivors += [job] * passed
        print(f"{'SURVIVED' if passed else 'killed  '}  {seconds:4.0f} s  {job.name}", flush=True)
    if failing:
        print("the tests fail before anything is broken:", *failing, sep="\n  ")
        return 2
    killed = len(chosen) - len(survivors)
    print(f"{killed} of {len(chosen)} killed in {time.perf_counter() - start:.0f} s")
    for mutation in survivors:
        print(f"survived: {mutation.name} ({mutation.file}); its tests: {mutation.tests}")
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
