// Features of all slides in parts, side by side on whatever Nextflow runs on, then a study.
//
//   nextflow run main.nf --slides /data/slides --out /data/phikon --shards 8
//   nextflow run main.nf --slides s3://lab/slides --out s3://lab/phikon --cohort s3://lab/cohort.csv --run s3://lab/runs/a
//
// Paths are read by the commands themselves, so they must be absolute, and seen by every node (or be in a store).
nextflow.enable.dsl = 2

params.slides = null
params.out = null
params.cohort = null
params.run = 'runs/study'
params.encoder = 'phikon'
params.shards = 8

process WEIGHTS {
    output: val true
    script: "python '${projectDir}/../weights.py' '${params.encoder}'"
}

process EXTRACT {
    tag "${part}/${params.shards}"
    cpus 8
    errorStrategy { task.exitStatus in [130, 137, 143] ? 'retry' : 'finish' }  // killed: what is done is kept
    maxRetries 3
    input: val ready; val part
    output: val part
    script: "python -m extract.run slides.folder='${params.slides}' out='${params.out}' encoder.name='${params.encoder}' shard=${part}/${params.shards} workers=${task.cpus}"
}

process TRAIN {
    input: val parts
    script: "python -m mil.train cohort='${params.cohort}' features.folder='${params.out}' out='${params.run}'"
}

workflow {
    if (!params.slides || !params.out) error 'set --slides FOLDER and --out FOLDER'
    parts = EXTRACT(WEIGHTS().collect(), Channel.of(1..params.shards))
    if (params.cohort) TRAIN(parts.collect())
}
