"""The keys that send a run's numbers to TensorBoard, Weights & Biases, MLflow or trackio. None is used unless asked."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from tessera.config.sections.section import LocalPath, Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _as_list(value: object) -> object:
    """One name as a list of one; `none`, null and nothing as an empty list."""
    names = value if isinstance(value, list) else [value]
    return [name for name in names if name and name != "none"]


def _nothing_is_null(value: object) -> object:
    return None if value is False or value == "" else value


Text = Annotated[str | None, BeforeValidator(_nothing_is_null)]


class TrackerKeys(Section):
    """Where the numbers of steps go besides metrics.jsonl."""

    report_to: Annotated[list[Tracker], BeforeValidator(_as_list)] = Field(
        [],
        description="Trackers by name: tensorboard, wandb, mlflow, trackio; one or a list. The use_ keys say the same.",
    )
    use_tensorboard: bool | None = Field(None, description="Write event files for TensorBoard.")
    logging_dir: LocalPath | None = Field(
        None, description="The folder of TensorBoard's event files. Unset: output_dir/runs."
    )
    use_wandb: bool | None = Field(None, description="Log to Weights & Biases. Unset: when wandb_project is given.")
    wandb_project: Text = Field(None, description="The project in Weights & Biases.")
    wandb_entity: Text = Field(None, description="The user or team in Weights & Biases that owns the project.")
    wandb_name: Text = Field(None, description="The name of the run in Weights & Biases. Unset: wandb_run_id.")
    wandb_run_id: Text = Field(
        None, description="The id of the run in Weights & Biases; a run that has this id there is continued."
    )
    wandb_mode: Annotated[Literal["online", "offline", "disabled"] | None, BeforeValidator(_nothing_is_null)] = Field(
        None,
        description="offline: keep the run in output_dir/wandb; disabled: do not use it. Unset: WANDB_MODE of the "
        "environment, or online; without an API key on the machine offline.",
    )
    use_mlflow: bool | None = Field(None, description="Log to MLflow.")
    mlflow_tracking_uri: Text = Field(
        None,
        description="The server or store of MLflow. Unset: MLFLOW_TRACKING_URI of the environment, or output_dir: "
        "mlflow.db where the whole of MLflow is installed, mlruns with mlflow-skinny.",
    )
    mlflow_experiment_name: Text = Field(None, description="The experiment in MLflow. Unset: tessera.")
    mlflow_run_name: Text = Field(None, description="The name of the run in MLflow.")
    use_trackio: bool | None = Field(None, description="Log to trackio. Unset: when trackio_project_name is given.")
    trackio_project_name: Text = Field(None, description="The project in trackio.")
    trackio_run_name: Text = Field(None, description="The name of the run in trackio.")
    trackio_space_id: Text = Field(
        None, description="The Space of the Hugging Face hub that trackio logs to. Unset: this machine."
    )

    @property
    def trackers(self) -> dict[Tracker, str]:
        """The trackers that are asked for, each with the key that asks."""
        found: dict[Tracker, str] = dict.fromkeys(self.report_to, "report_to")
        asking: dict[Tracker, tuple[bool | None, str, str | None]] = {
            "tensorboard": (self.use_tensorboard, "", None),
            "wandb": (self.use_wandb, "wandb_project", self.wandb_project),
            "mlflow": (self.use_mlflow, "", None),
            "trackio": (self.use_trackio, "trackio_project_name", self.trackio_project_name),
        }
        for name, (use, key, project) in asking.items():
            if use or use is None and project:
                found[name] = f"use_{name}" if use else key
            elif use is False:
                found.pop(name, None)
        if self.wandb_mode == "disabled":
            found.pop("wandb", None)
        return found

    def idle_tracker_keys(self) -> dict[str, str]:
        """The keys given that do nothing, since their tracker is not asked for: each with that tracker."""
        idle: dict[str, str] = {}
        for key in TrackerKeys.model_fields:
            name = "tensorboard" if key == "logging_dir" else key.partition("_")[0]
            if key != "report_to" and name != "use" and getattr(self, key) and name not in self.trackers:
                idle[key] = name
        return {key: name for key, name in idle.items() if not (name == "wandb" and self.wandb_mode == "disabled")}
