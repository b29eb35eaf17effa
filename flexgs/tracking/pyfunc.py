"""The elastic model as an MLflow pyfunc model: a row with a budget goes in, a cut as PLY comes back.

    model = mlflow.pyfunc.load_model("models:/flexgs-garden@best")
    cuts = model.predict(pd.DataFrame({"budget": ["5%", "20MB"], "path": ["a.ply", "b.ply"]}))
    cuts                                           # a row each: gaussians, ratio, bytes, path

Without a path, the column ply of the answer holds the file itself, so that a model that is served on another
machine (`mlflow models serve`) can be used.

MLflow keeps a copy of this file and of the package's modules beside the model and runs it on loading ("models
from code"); the weights are safetensors and JSON. Nothing is pickled, and flexgs need not be installed where
the model is loaded.
"""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType

from flexgs.errors import UserError
from flexgs.inputs import read_json
from flexgs.model.elastic import ElasticModel
from flexgs.ply import write_ply

FOLDER = "folder.json"
"""The file, in place of the model, that says which folder a large model is in."""
MODEL = ("model.safetensors", "model.json")
"""The files that ElasticModel.save writes."""
NEEDS = ("mlflow", "torch", "numpy", "pandas", "safetensors", "plyfile", "filelock")
"""The packages that cutting a model imports."""
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "budget"), ColSpec(DataType.string, "path", required=False)]),
    outputs=Schema([ColSpec(DataType.long, "gaussians"), ColSpec(DataType.double, "ratio"),
                    ColSpec(DataType.long, "bytes"), ColSpec(DataType.string, "path", required=False),
                    ColSpec(DataType.binary, "ply", required=False)]))


class Cutter(PythonModel):
    """The MLflow model, which cuts the elastic model beside it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the elastic model; UserError if a large one is no longer where it was trained."""
        where = context.artifacts.get(FOLDER)
        folder = (read_json(Path(where), dict[str, str])["folder"] if where
                  else Path(context.artifacts["model.json"]).parent)
        self.model = ElasticModel.load(Path(folder))

    def predict(self, context: PythonModelContext | None, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Cut the model once for each row of model_input.

        Args:
            context: MLflow's, not used.
            model_input: the columns budget, as in ElasticModel.cut, and optionally path, a .ply to write.
            params: not used.

        Returns:
            The columns gaussians (number kept), ratio, bytes, path and ply (the file, where path is missing).
        """
        rows = []
        for row in model_input.to_dict("records"):
            path = row.get("path")
            rows.append(self.cut(row["budget"], Path(path) if isinstance(path, str) else None))
        return pd.DataFrame(rows, columns=["gaussians", "ratio", "bytes", "path", "ply"])

    def cut(self, budget: str | float, path: Path | None) -> dict[str, Any]:
        """Return one row of predict(); UserError unless path is None or the name of an uncompressed PLY."""
        if path is not None and (path.suffix.lower() != ".ply" or path.stem.lower().endswith(".compressed")):
            # Visitors of a served model choose the path: no file of another kind may be overwritten.
            raise UserError(f"path {path}: expected a name that ends in .ply, and not in .compressed.ply")
        splats = self.model.cut(budget)
        with tempfile.TemporaryDirectory() as folder:
            file = path or Path(folder) / "cut.ply"
            write_ply(splats, file)
            return {"gaussians": len(splats), "ratio": len(splats) / len(self.model.splats),
                    "bytes": file.stat().st_size, "path": path and str(path),
                    "ply": None if path else file.read_bytes()}


def save(model: Path, folder: Path, about: Model | None = None, copied: bool = True) -> None:
    """Write an MLflow model.

    Args:
        model: the folder that ElasticModel.save has written.
        folder: the folder to write.
        about: MLflow's description of the model, such as the run that it belongs to.
        copied: whether the model itself is copied; else only the name of its folder is.
    """
    here = Path(__file__)
    with tempfile.TemporaryDirectory() as temporary:
        files = [model / name for name in MODEL]
        if not copied:
            files = [Path(temporary) / FOLDER]
            files[0].write_text(json.dumps({"folder": str(model.absolute())}))
        package = shutil.copytree(here.parents[1], Path(temporary) / "flexgs", ignore=_no_modules)
        mlflow.pyfunc.save_model(
            folder, mlflow_model=about, python_model=str(here), code_paths=[str(package)],
            artifacts={path.name: str(path) for path in files},
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDS],
            signature=SIGNATURE, input_example=pd.DataFrame({"budget": ["5%"]}))


def _no_modules(folder: str, names: list[str]) -> list[str]:
    """Return the names in a package's folder that are no modules or packages, such as compiled files."""
    modules = {name for name in names if name.removesuffix(".py").isidentifier()
               and (name.endswith(".py") or Path(folder, name, "__init__.py").is_file())}
    return [name for name in names if name not in modules]


mlflow.models.set_model(Cutter())
