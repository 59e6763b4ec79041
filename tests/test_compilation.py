"""What is compiled from the simulator's sources is not used for other sources."""

import importlib
import pkgutil
from pathlib import Path

from numba import config
from numba.core.dispatcher import Dispatcher

from fuel_ray import sim
from fuel_ray.home import compile_cache
from fuel_ray.sim.compilation import _SOURCES, folder


def dispatchers():
    for found in pkgutil.iter_modules(sim.__path__):
        module = importlib.import_module(f"fuel_ray.sim.{found.name}")
        yield from (value for value in vars(module).values() if isinstance(value, Dispatcher))


def test_compiled_code_is_kept_for_all_sources_together():
    kept = [path for dispatcher in dispatchers() if (path := dispatcher.stats.cache_path)]
    own = folder(Path(config.CACHE_DIR or compile_cache()), _SOURCES)
    assert len(kept) > 20 and all(own in Path(path).parents for path in kept)


def test_a_change_of_any_source_is_another_folder(tmp_path):
    for name, text in (("a.py", "x = 1"), ("b.py", "y = 1")):
        (tmp_path / name).write_text(text)
    before = folder(tmp_path, tmp_path)
    assert folder(tmp_path, tmp_path) == before
    (tmp_path / "b.py").write_text("y = 2")
    folder.cache_clear()
    assert folder(tmp_path, tmp_path) != before
