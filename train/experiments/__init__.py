"""Experiments: commands that train many runs on one base, and report what they show.

Read in this order:

    experiment        `Experiment`, the base class of the three commands: flags, folder, settings, stop and resume
    base_cache        `BaseCache`: the base and the rows, loaded once for all runs
    sweep/            `graftax sweep`: trials (axes -> runs), programs (trials that share a compiled step), lanes (one
                      vmapped step), scheduler (chunks, saves, halving), results (results.jsonl), command
    step_costs        time, memory and FLOPs of a training step; how many lanes to train at a time
    stats             confidence intervals and significance of scores, by bootstrap
    task_evaluator    `TaskEvaluator`: the test rows and the metric of a task
    results_log       results.jsonl of a comparison or decision
    compare           `graftax compare`: trainings (their runs), comparison (costs, rates, seeds, test)
    decide            `graftax decide`: a comparison, and prompting (prompts, example_selection), learning_curve
    report/           tables, plots, and the reports of a sweep (sweep), a comparison (comparison, compare) and a
                      decision (options, decide)
"""
