resource "google_pubsub_topic" "queue" {
  for_each   = local.topics
  name       = "${var.queue_prefix}-${each.key}"
  depends_on = [google_project_service.needed]
}

resource "google_pubsub_subscription" "jobs" {
  for_each                   = local.queues
  name                       = "${var.queue_prefix}-jobs-${each.key}"
  topic                      = google_pubsub_topic.queue["jobs"].id
  filter                     = "attributes.pool = \"${each.value.pool}\" AND attributes.band = \"${each.value.band}\""
  ack_deadline_seconds       = var.lease_seconds
  message_retention_duration = "86400s"
  expiration_policy {
    ttl = ""
  }
  dead_letter_policy {
    dead_letter_topic     = google_pubsub_topic.queue["dead"].id
    max_delivery_attempts = min(max(2 * var.attempts + 4, 5), 100)
  }
}

resource "google_pubsub_subscription" "dead" {
  name                       = "${var.queue_prefix}-dead"
  topic                      = google_pubsub_topic.queue["dead"].id
  ack_deadline_seconds       = 10
  message_retention_duration = "86400s"
  expiration_policy {
    ttl = ""
  }
}
