"""`python -m worker`: a Celery worker of the queues in VERITUNE_WORKER_QUEUES, threads, one slot."""

from worker.celery import application, settings


def main() -> None:
    application.worker_main(
        [
            "worker",
            f"--queues={','.join(settings.queues)}",
            "--pool=threads",
            "--concurrency=1",
            "--loglevel=warning",
            "--without-gossip",
            "--without-mingle",
            f"--hostname=veritune-{'-'.join(settings.queues)}@%h",
        ]
    )


if __name__ == "__main__":
    main()
