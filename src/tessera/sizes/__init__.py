"""Which sizes and schedules fit: whole numbers only, without torch."""
