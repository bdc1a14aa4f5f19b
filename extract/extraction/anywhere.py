"""A cohort extracted where the config says: in this process, by a process for each GPU, or on a cluster."""

from __future__ import annotations

from collections.abc import Iterable

from extract.config import ExtractConfig
from extract.extraction.claims import Nobodys
from extract.extraction.devices import devices_of, extract_on_devices, on_device
from extract.extraction.readers import SlideFile
from extract.extraction.summary import Summary, record_failures, tidy_up_after_the_dead
from extract.extraction.work import asked_for, extract_cohort, output_error
from extract.lock import only_command_in


def extract_anywhere(
    config: ExtractConfig, slides: Iterable[SlideFile], *, progress: bool = True, wait_for_others: bool = False
) -> Summary:
    """`extract_cohort`, which says what it raises, where `config.run` says."""
    if config.run.on == "ray":
        return extract_on_cluster(config, slides, progress)
    devices = devices_of(config)
    if len(devices) == 1:
        return extract_cohort(on_device(config, devices[0]), slides, progress=progress, wait_for_others=wait_for_others)
    asked = asked_for(to_look(config), slides)
    return extract_on_devices(config, asked, devices, progress=progress, wait_for_others=wait_for_others)


def to_look(config: ExtractConfig) -> ExtractConfig:
    """For a process that loads the encoder only to say what files will state."""
    here = on_device(config, "cpu")
    return here.model_copy(update={"encoder": here.encoder.model_copy(update={"compile": False, "precision": "auto"})})


def extract_on_cluster(config: ExtractConfig, slides: Iterable[SlideFile], progress: bool) -> Summary:
    """Nobody else has the folder meanwhile, and every slide is one worker's, so nothing is claimed.

    Raises:
        ClusterError: no such cluster, or its nodes are not alike.
    """
    from extract.extraction.cluster import refuse_without_ray
    from extract.extraction.ray_slides import extract_on_ray

    refuse_without_ray()
    asked = asked_for(to_look(config), slides)
    summary = asked.summary()
    with only_command_in(asked.folder, "extract.run"):
        try:
            tidy_up_after_the_dead(asked.folder, Nobodys(), asked.there)
            if asked.todo:
                extract_on_ray(config, asked.wanted, asked.todo, summary, progress)
            record_failures(asked.folder, Nobodys(), summary)
        except OSError as error:
            raise output_error(asked.folder, error) from error
    return summary
