"""What Airflow runs. Nothing else imports airflow; every task calls a function or a command of flywheel."""
