"""The only place that patches fairseq, torch, NumPy or the C library; each patch has its reason and a test that fails without it.

``--user-dir`` is imported while the command line is parsed, before fairseq reads a checkpoint or starts its workers, so
that patches made at import reach all of it (``fairseq-hydra-train`` imports it later: see
:func:`.workers.refuse_lone_workers`).
"""

from fairseq_adaptive.compat import (
    aliases,
    allocation,
    batches,
    binaries,
    checkpoints,
    endings,
    ensembles,
    evaluation,
    fitting,
    generation,
    hypotheses,
    labels,
    literals,
    locks,
    meters,
    noise,
    numbers,
    omissions,
    paths,
    precision,
    presets,
    quantization,
    restoring,
    saving,
    setups,
    targets,
    tensorboard,
    untrusted_flags,
    waits,
    workers,
)

PATCHES = (
    noise.silence_warnings,
    allocation.keep_memory,
    batches.restore_np_compat,
    checkpoints.load_safely,
    literals.read_literals,
    untrusted_flags.guard_flags,
    saving.save_atomically,
    saving.save_plain,
    saving.copy_atomically,
    workers.count_torchrun_workers,
    workers.train_cpu_workers,  # before it: what is on a CPU asks no GPU
    workers.check_backend,
    workers.refuse_lone_workers,
    workers.exchange_objects,
    batches.resume_same_batches,
    batches.keep_last_batch,
    batches.end_reading_ahead,
    checkpoints.gather_before_saving,
    checkpoints.resume_task_state,
    precision.mix_precision,
    generation.let_models_search,
    generation.take_drafting_flags,
    labels.check_labels,
    evaluation.hold_weights,
    omissions.refuse_omissions,
    omissions.take_trained_length,
    omissions.refuse_empty_perplexity,
    workers.validate_uneven_batches,
    aliases.restore_np_float,
    aliases.restore_np_int,
    aliases.name_percentile_method,
    quantization.quantize_anywhere,
    quantization.quantize_our_maps,
    hypotheses.tell_sentences_apart,
    hypotheses.refuse_missing_history,
    hypotheses.refuse_missing_constraints,
    hypotheses.align_unknown_words,
    workers.see_one_save_dir,
    restoring.explain_other_training,
    restoring.find_what_to_restore,
    endings.resume_patience,
    endings.end_what_is_finished,
    locks.lock_save_dir,
    waits.note_long_waits,
    binaries.check_binaries,
    binaries.check_dictionaries,
    ensembles.name_wrong_checkpoints,
    paths.refuse_unwritable_save_dir,
    fitting.check_before_training,
    meters.start_with_empty_meters,
    presets.keep_presets,
    setups.check_setups,
    targets.steer_to_the_end,
    tensorboard.write_histograms,
    numbers.check_stock_numbers,  # last: what is asked first
)
applied = []  # names of the patches that are in force, in order
fairseq_error = None  # why fairseq cannot be imported, where it cannot


def apply() -> bool:
    """Apply every patch that this environment needs; calling it again does nothing.

    Returns:
        whether fairseq can be imported; where it cannot, ``fairseq_error`` holds the exception and nothing is patched
    """
    global fairseq_error
    if applied:
        return True
    try:
        with noise.as_it_was():
            import fairseq  # noqa: F401
    except Exception as error:  # PyPI's fairseq 0.12.2 fails with ValueError on Python 3.11
        fairseq_error = error
        return False
    for patch in PATCHES:
        if patch() is not False:
            applied.append(patch.__name__)
    return True
