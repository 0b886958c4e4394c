# What a fleet needs of Google Cloud: Pub/Sub, a bucket, an account for each
# program, and no more rights than it uses. The cluster is not made here.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 5.0, < 8.0"
    }
  }
}

provider "google" {
  project = var.project
}

data "google_project" "this" {
  project_id = var.project
}

locals {
  # As mettle/queue/pubsub names and filters them. Change nothing of a
  # subscription here alone: `mettle setup` would put it back.
  topics = toset(["jobs", "updates", "cancel", "notices", "dead"])
  bands  = ["urgent", "normal", "low"]
  queues = { for pair in setproduct(var.pools, local.bands) : "${pair[0]}-${pair[1]}" => { pool = pair[0], band = pair[1] } }
}

resource "google_project_service" "needed" {
  for_each           = toset(["pubsub.googleapis.com", "storage.googleapis.com", "iam.googleapis.com"])
  service            = each.key
  disable_on_destroy = false
}
