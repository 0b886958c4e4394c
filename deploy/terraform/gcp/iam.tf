resource "google_service_account" "program" {
  for_each     = toset(["elan", "api", "worker"])
  account_id   = "mettle-${each.key}"
  display_name = "Mettle: ${each.key}"
}

# Pods act as these accounts by Workload Identity.
resource "google_service_account_iam_member" "pods" {
  for_each           = { elan = "elan", api = "mettle-api", worker = "mettle-worker" }
  service_account_id = google_service_account.program[each.key].name
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${var.project}.svc.id.goog[${var.kubernetes_namespace}/${each.value}]"
}

# The storage servers alone see the bucket.
resource "google_storage_bucket_iam_member" "elan" {
  bucket = google_storage_bucket.blobs.name
  role   = "roles/storage.objectUser"
  member = google_service_account.program["elan"].member
}

# Who publishes where: mettle/queue/pubsub/README.md, "Rights".
locals {
  publishers = merge(
    { for t in ["jobs", "cancel", "notices", "updates"] : "api-${t}" => { program = "api", topic = t } },
    { for t in ["updates", "notices", "jobs"] : "worker-${t}" => { program = "worker", topic = t } },
  )
  # Whose processes make subscriptions of their own, and to what.
  listeners = {
    api-updates   = { program = "api", topic = "updates" }
    api-notices   = { program = "api", topic = "notices" }
    worker-cancel = { program = "worker", topic = "cancel" }
  }
}

resource "google_pubsub_topic_iam_member" "publisher" {
  for_each = local.publishers
  topic    = google_pubsub_topic.queue[each.value.topic].id
  role     = "roles/pubsub.publisher"
  member   = google_service_account.program[each.value.program].member
}

resource "google_project_iam_custom_role" "attach" {
  role_id     = "${replace(var.queue_prefix, "-", "_")}_attach"
  title       = "Mettle: subscribe to a topic"
  permissions = ["pubsub.topics.attachSubscription"]
}

resource "google_pubsub_topic_iam_member" "listener" {
  for_each = local.listeners
  topic    = google_pubsub_topic.queue[each.value.topic].id
  role     = google_project_iam_custom_role.attach.id
  member   = google_service_account.program[each.value.program].member
}

# Each process makes and removes subscriptions of its own, whose names are not known
# before, and IAM knows no conditions on the names of Pub/Sub. So these rights are of
# the whole project: give the fleet one that has no other subscriptions.
resource "google_project_iam_custom_role" "subscribe" {
  role_id     = "${replace(var.queue_prefix, "-", "_")}_subscribe"
  title       = "Mettle: make, read and remove subscriptions"
  permissions = ["pubsub.subscriptions.create", "pubsub.subscriptions.get", "pubsub.subscriptions.consume", "pubsub.subscriptions.delete"]
}

resource "google_project_iam_member" "subscribe" {
  for_each = toset(["api", "worker"])
  project  = var.project
  role     = google_project_iam_custom_role.subscribe.id
  member   = google_service_account.program[each.key].member
}

# Pub/Sub itself carries dead letters.
locals {
  pubsub_agent = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-pubsub.iam.gserviceaccount.com"
}

resource "google_pubsub_topic_iam_member" "agent_dead" {
  topic  = google_pubsub_topic.queue["dead"].id
  role   = "roles/pubsub.publisher"
  member = local.pubsub_agent
}

resource "google_pubsub_subscription_iam_member" "agent_jobs" {
  for_each     = google_pubsub_subscription.jobs
  subscription = each.value.name
  role         = "roles/pubsub.subscriber"
  member       = local.pubsub_agent
}
